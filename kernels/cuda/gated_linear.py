"""Gate, up and SiLU of decode batches of 65 to 256 tokens on Hopper GPUs. The kernel is in gated_linear.cu;
`kernels.linear` holds the reference.

With so many tokens, the product's arithmetic takes about as long as reading its weight. A library's power-of-two tiles
then lose much time to a half-empty last wave: of Llama-3.1-8B's 224 tiles, 132 run in the first wave and only 92 in the
second. Here, the tile height is chosen so that all SMs finish together. Thread blocks are persistent: they load the
weight of their next tile while they write the current one. SiLU is part of the epilogue.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from kernels.cuda.cuda_kernel import HOPPER_STEP_BYTES, CudaKernel, suits_hopper, tensor_map
from kernels.cuda.gpu import multiprocessors, shared_bytes

_STEP = HOPPER_STEP_BYTES // 2  # inputs, of 16 bits
_TOKENS = 128  # most of a thread block
_X_UNIT = 32  # that the tokens it loads are a multiple of: few sizes, since each is a kernel of its own
MAX_ROWS = 2 * _TOKENS
_THREADS = 2 * 128 + 32
_UNIT = 16  # the smallest number of tile rows that a thread block loads: eight of gate and eight of up
_TILE_COST = 64  # rows that could be multiplied in the time that a tile takes whatever its height, with x to be loaded
_MAX_TILE = 256  # rows: the largest N of a wgmma instruction


@dataclass(frozen=True, slots=True)
class _Plan:
    sharing: int  # thread blocks that share a tile
    x_rows: int  # tokens that each of them loads
    tile_rows: int  # of the weight
    stages: int
    programs: int  # thread blocks of the grid

    @property
    def shared_bytes(self) -> int:
        return self.stages * (_stage_bytes(self.tile_rows) + 2 * 8)


def _stage_bytes(tile_rows: int) -> int:
    return (tile_rows + _TOKENS) * HOPPER_STEP_BYTES


@cache
def _plan(tokens: int, rows: int, inputs: int, device: torch.device) -> _Plan:
    sharing = triton.cdiv(tokens, _TOKENS)
    at_once = multiprocessors(device) // sharing

    def cost(tile_rows: int) -> tuple[int, int]:
        rounds = triton.cdiv(triton.cdiv(rows, tile_rows), at_once)
        return rounds * (tile_rows + _TILE_COST), -tile_rows

    tile_rows = min(range(_UNIT * sharing, _MAX_TILE + 1, _UNIT * sharing), key=cost)
    stages = min(inputs // _STEP, shared_bytes(device) // (_stage_bytes(tile_rows) + 2 * 8))
    programs = min(at_once, triton.cdiv(rows, tile_rows)) * sharing
    x_rows = -(-tokens // (sharing * _X_UNIT)) * _X_UNIT
    return _Plan(sharing, x_rows, tile_rows, stages, programs)


def suits_gated(x: Tensor, weight: Tensor) -> bool:
    """Whether `gated_linear` supports this x and weight."""
    return 0 < x.shape[0] <= MAX_ROWS and suits_hopper(x, weight) and weight.shape[0] % _UNIT == 0


@cache
def _kernel(plan: _Plan, dtype: torch.dtype, device: torch.device) -> CudaKernel:
    macros = {"SHARING": plan.sharing, "ROWS": plan.tile_rows, "STAGES": plan.stages, "X_ROWS": plan.x_rows}
    return CudaKernel("gated_linear", plan.tile_rows, macros, plan.shared_bytes, dtype, device)


def gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T), for inputs that `suits_gated` accepts, bfloat16 or float16.

    x [1 to MAX_ROWS, inputs]; weight [2 * outputs, inputs]: gate in the first half, up in the second. Returns [rows,
    outputs].
    """
    tokens, inputs = x.shape
    outputs = weight.shape[0] // 2
    plan = _plan(tokens, weight.shape[0], inputs, x.device)
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    x_map = tensor_map(x, (inputs, tokens), (x.stride(0),), (_STEP, plan.x_rows))
    weight_map = tensor_map(
        weight,
        (inputs, 8, 2, outputs // 8),
        (inputs, outputs * inputs, 8 * inputs),
        (_STEP, 8, 2, plan.tile_rows // _UNIT // plan.sharing),
    )
    numbers = (ctypes.c_int(number) for number in (tokens, inputs, outputs))
    arguments = (x_map, weight_map, ctypes.c_void_p(out.data_ptr()), *numbers)
    _kernel(plan, x.dtype, x.device)(plan.programs, _THREADS, arguments)
    return out
