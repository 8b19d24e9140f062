"""Linear layers of small decode batches on Hopper GPUs, at the pace of their weights' bytes; the kernel is in
streamed_linear.cu, and `kernels.linear` holds the references.

With few tokens a product takes as long as its weight takes to be read, and a library's kernel begins to read when the
one before it has ended. This one asks for as much of the weight as shared memory holds while that still runs, has bias,
gated activation and residual inside, and where there are too few tiles for all multiprocessors adds up the parts of
several within a cluster. It is written in CUDA C++, as Triton has neither clusters nor a say in what is loaded before a
kernel waits.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from kernels.cuda_kernel import HOPPER_ALIGNMENT, HOPPER_STEP, CudaKernel, suits_hopper, tensor_map
from kernels.triton_launch import multiprocessors, shared_bytes

MAX_ROWS = 64
_TILE = 64  # rows of the weight that four warps multiply
_MAX_STAGES = 16
_RING_BYTES = 192 << 10  # more would only keep the next kernel's programs out
_RESERVED_BYTES = 1 << 10  # of shared memory, that the system takes for each program
_VALUES = 8  # that a thread writes at once


@dataclass(frozen=True, slots=True)
class _Plan:
    tokens: int  # the tile's
    warpgroups: int  # with _TILE rows of the weight each
    splits: int  # programs that share a tile's inputs
    stages: int
    programs: int

    @property
    def tile_rows(self) -> int:
        return _TILE * self.warpgroups

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups + 32

    @property
    def shared_bytes(self) -> int:
        sums = self.tokens * (self.tile_rows + 4) * 4
        return max(self.stages * _stage_bytes(self.tile_rows, self.tokens), sums) + 2 * 8 * self.stages


def _stage_bytes(tile_rows: int, tokens: int) -> int:
    return (tile_rows + tokens) * HOPPER_STEP * 2


@cache
def _plan(tokens: int, rows: int, inputs: int, device: torch.device) -> _Plan | None:
    """For a weight of so many rows and inputs; None where its programs would not all run at once: then a kernel whose
    programs take tile after tile is faster."""
    tokens = max(8, triton.next_power_of_2(tokens))
    processors = multiprocessors(device)
    warpgroups = 2 if rows > 2 * processors * _TILE else 1
    tiles = triton.cdiv(rows, warpgroups * _TILE)
    steps = inputs // HOPPER_STEP
    splits, most = 1, 8 if tokens <= 16 else 4  # adding up takes time for each token
    while 2 * splits <= most and 2 * splits * tiles <= processors and steps >= 8 * splits:
        splits *= 2
    programs = tiles * splits
    if programs > 2 * processors:
        return None
    room = min(_RING_BYTES, (shared_bytes(device) + _RESERVED_BYTES) // triton.cdiv(programs, processors) - 2048)
    own_steps = triton.cdiv(steps, splits)
    stages = min(own_steps, room // _stage_bytes(warpgroups * _TILE, tokens), _MAX_STAGES)
    assert stages >= min(own_steps, 2)  # a stage is emptied while the next is multiplied
    return _Plan(tokens, warpgroups, splits, stages, programs)


def suits_stream(x: Tensor, weight: Tensor, *, gated: bool = False) -> bool:
    """Whether `streamed_linear` takes these."""
    tokens, inputs = x.shape
    rows = weight.shape[0]
    return (
        0 < tokens <= MAX_ROWS
        and suits_hopper(x, weight)
        and rows % (_VALUES * (2 if gated else 1)) == 0
        and _plan(tokens, rows, inputs, x.device) is not None
    )


@cache
def _kernel(plan: _Plan, gated: bool, dtype: torch.dtype, device: torch.device) -> CudaKernel:
    macros = {
        "TOKENS": plan.tokens,
        "WARPGROUPS": plan.warpgroups,
        "SPLITS": plan.splits,
        "STAGES": plan.stages,
        "GATED": int(gated),
    }
    return CudaKernel("streamed_linear", plan.tokens, macros, plan.shared_bytes, dtype, device)


def streamed_linear(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None, gated: bool = False
) -> Tensor:
    """x [1 to MAX_ROWS, inputs] and weight [outputs, inputs] -> [rows, outputs], or `residual` with that added; gated:
    half the outputs, SiLU of the first half times the second. They must suit."""
    tokens, inputs = x.shape
    halves = 2 if gated else 1
    outputs = weight.shape[0] // halves
    plan = _plan(tokens, weight.shape[0], inputs, x.device)
    assert plan is not None
    assert all(tensor is None or tensor.data_ptr() % HOPPER_ALIGNMENT == 0 for tensor in (bias, residual))
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device) if residual is None else residual
    x_map = tensor_map(x, (inputs, tokens), (x.stride(0),), (HOPPER_STEP, plan.tokens))
    weight_map = tensor_map(
        weight,
        (inputs, 8, halves, outputs // 8),
        (inputs, outputs * inputs, 8 * inputs),
        (HOPPER_STEP, 8, halves, plan.tile_rows // 8 // halves),
    )
    _kernel(plan, gated, x.dtype, x.device)(
        plan.programs,
        plan.threads,
        (
            x_map,
            weight_map,
            *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in (bias, residual, out)),
            *(ctypes.c_int(number) for number in (tokens, inputs, outputs)),
        ),
    )
    return out
