"""Gate, up and SiLU of decode batches of 65 to 256 tokens on Hopper GPUs; the kernel is in gated_linear.cu, and
`kernels.linear` holds the reference.

With so many tokens the product takes about as long for its operations as for its weight's bytes, and a library's tiles
of a power of two leave many multiprocessors idle in their last round: of Llama-3.1-8B's 224 tiles, 132 run at once and
then 92. A tile here is as high as it has to be for all multiprocessors to end together, and programs that stay for
several ask for the next one's weight while they write. SiLU is inside.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from kernels.cuda_kernel import HOPPER_STEP, CudaKernel, suits_hopper, tensor_map
from kernels.triton_launch import multiprocessors, shared_bytes

_TOKENS = 128  # of a program
MAX_ROWS = 2 * _TOKENS
_THREADS = 2 * 128 + 32
_UNIT = 16  # rows of a tile that a program brings at least: eight of gate, and eight of up
_MAX_TILE = 256  # rows, for which the matrix units have an instruction


@dataclass(frozen=True, slots=True)
class _Plan:
    sharing: int  # programs that share a tile, with 128 tokens each
    tile_rows: int  # of the weight
    stages: int
    programs: int

    @property
    def shared_bytes(self) -> int:
        return self.stages * (_stage_bytes(self.tile_rows) + 2 * 8)


def _stage_bytes(tile_rows: int) -> int:
    return (tile_rows + _TOKENS) * HOPPER_STEP * 2


@cache
def _plan(tokens: int, rows: int, inputs: int, device: torch.device) -> _Plan:
    sharing = triton.cdiv(tokens, _TOKENS)
    at_once = multiprocessors(device) // sharing

    def rounds_of_rows(tile_rows: int) -> tuple[int, int]:
        tiles = triton.cdiv(rows, tile_rows)
        return triton.cdiv(tiles, at_once) * tile_rows, -tile_rows

    tile_rows = min(range(_UNIT * sharing, _MAX_TILE + 1, _UNIT * sharing), key=rounds_of_rows)
    stages = min(inputs // HOPPER_STEP, shared_bytes(device) // (_stage_bytes(tile_rows) + 2 * 8))
    programs = min(at_once, triton.cdiv(rows, tile_rows)) * sharing
    return _Plan(sharing, tile_rows, stages, programs)


def suits_gated(x: Tensor, weight: Tensor) -> bool:
    """Whether `gated_linear` takes these."""
    return 0 < x.shape[0] <= MAX_ROWS and suits_hopper(x, weight) and weight.shape[0] % _UNIT == 0


@cache
def _kernel(plan: _Plan, dtype: torch.dtype, device: torch.device) -> CudaKernel:
    macros = {"SHARING": plan.sharing, "ROWS": plan.tile_rows, "STAGES": plan.stages}
    return CudaKernel("gated_linear", plan.tile_rows, macros, plan.shared_bytes, dtype, device)


def gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [1 to MAX_ROWS, inputs] and the weight of gate and up [2 * outputs, inputs] -> [rows, outputs], SiLU of the
    first half times the second. They must suit."""
    tokens, inputs = x.shape
    outputs = weight.shape[0] // 2
    plan = _plan(tokens, weight.shape[0], inputs, x.device)
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    x_map = tensor_map(x, (inputs, tokens), (x.stride(0),), (HOPPER_STEP, _TOKENS))
    weight_map = tensor_map(
        weight,
        (inputs, 8, 2, outputs // 8),
        (inputs, outputs * inputs, 8 * inputs),
        (HOPPER_STEP, 8, 2, plan.tile_rows // _UNIT // plan.sharing),
    )
    numbers = (ctypes.c_int(number) for number in (tokens, inputs, outputs))
    arguments = (x_map, weight_map, ctypes.c_void_p(out.data_ptr()), *numbers)
    _kernel(plan, x.dtype, x.device)(plan.programs, _THREADS, arguments)
    return out
