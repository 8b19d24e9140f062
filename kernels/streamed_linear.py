"""Linear layers of small decode batches on Hopper GPUs, at the pace of their weights' bytes; the kernel is in
streamed_linear.cu, and `kernels.linear` holds the references.

With few tokens a product takes as long as its weight takes to be read, and a library's kernel begins to read when the
one before it has ended. This one asks for as much of the weight as shared memory holds while that still runs, has bias,
gated activation and residual inside, and where there are too few tiles for all multiprocessors adds up the parts of
several within a cluster. It is written in CUDA C++, as Triton has neither clusters nor a say in what is loaded before a
kernel waits.

A norm between two such layers takes no launch of its own, but what `kernels.hidden` says.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from kernels.cuda_kernel import HOPPER_ALIGNMENT, HOPPER_STEP, CudaKernel, suits_hopper, tensor_map
from kernels.hidden import BegunNorm, Hidden
from kernels.triton_launch import multiprocessors, shared_bytes

MAX_ROWS = 64
_TILE = 64  # rows of the weight that four warps multiply
_MAX_STAGES = 16
_SHORT_RING = 8  # stages of x, which comes from the L2 cache
_RING_BYTES = 192 << 10  # more would only keep the next kernel's programs out
_RESERVED_BYTES = 1 << 10  # of shared memory, that the system takes for each program
_MAX_PARTS = 16  # that a token's squares are summed in
_VALUES = 8  # that a thread writes at once


@dataclass(frozen=True, slots=True)
class _Plan:
    tokens: int  # the tile's
    warpgroups: int  # with _TILE rows of the weight each
    splits: int  # programs that share a tile's inputs
    weight_stages: int
    x_stages: int
    tiles: int

    @property
    def tile_rows(self) -> int:
        return _TILE * self.warpgroups

    @property
    def programs(self) -> int:
        return self.tiles * self.splits

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups + 32

    @property
    def shared_bytes(self) -> int:
        sums = self.tokens * (self.tile_rows + 4) * 4
        ring = self.weight_stages * _stage_bytes(self.tile_rows) + self.x_stages * _stage_bytes(self.tokens)
        return max(ring, sums) + 8 * (self.weight_stages + 2 * self.x_stages) + 4 * self.tokens


def _stage_bytes(rows: int) -> int:
    return rows * HOPPER_STEP * 2


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
    on_a_processor = triton.cdiv(tiles * splits, processors)
    if on_a_processor > 2:
        return None
    room = min(_RING_BYTES, (shared_bytes(device) + _RESERVED_BYTES) // on_a_processor - 2048)
    own_steps = triton.cdiv(steps, splits)
    weight_bytes, x_bytes = _stage_bytes(warpgroups * _TILE), _stage_bytes(tokens)
    weight_stages = x_stages = min(own_steps, room // (weight_bytes + x_bytes), _MAX_STAGES)
    if weight_stages < own_steps <= (room - _SHORT_RING * x_bytes) // weight_bytes:
        weight_stages, x_stages = own_steps, _SHORT_RING  # all of its part is asked for before x is there
    assert x_stages >= min(own_steps, 2)  # a stage is emptied while the next is multiplied
    return _Plan(tokens, warpgroups, splits, weight_stages, x_stages, tiles)


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
        "WEIGHT_STAGES": plan.weight_stages,
        "X_STAGES": plan.x_stages,
        "GATED": int(gated),
    }
    return CudaKernel("streamed_linear", plan.tokens, macros, plan.shared_bytes, dtype, device)


def streamed_linear(
    x: Tensor,
    weight: Tensor,
    *,
    squares: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """x [1 to MAX_ROWS, inputs] and weight [outputs, inputs] -> [rows, outputs]; squares: x is that of a norm that was
    begun (`kernels.hidden`); gated: half the outputs, SiLU of the first half times the second. They must suit."""
    outputs = weight.shape[0] // (2 if gated else 1)
    out = torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
    _launch(x, weight, out, squares=squares, eps=eps, bias=bias, gated=gated)
    return out


def add_streamed_linear(
    states: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, next_norm: Tensor | None
) -> Hidden:
    """`kernels.linear.add_linear` to `states`, contiguous. x and weight must suit."""
    tiles = _planned(x, weight).tiles
    # Where each program would have many sums to add up, a launch of the norm takes no longer; and float16 may not hold
    # a state times its weight.
    if next_norm is None or tiles > _MAX_PARTS or x.dtype != torch.bfloat16:
        _launch(x, weight, states, bias=bias, residual=states)
        return Hidden(states)
    begun = BegunNorm(
        torch.empty_like(states),
        torch.empty((x.shape[0], tiles), dtype=torch.float32, device=x.device),
    )
    _launch(x, weight, states, bias=bias, residual=states, next_norm=next_norm, begun=begun)
    return Hidden(states, begun)


def _planned(x: Tensor, weight: Tensor) -> _Plan:
    plan = _plan(x.shape[0], *weight.shape, x.device)
    assert plan is not None
    return plan


def _launch(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    squares: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    next_norm: Tensor | None = None,
    begun: BegunNorm | None = None,
) -> None:
    assert all(t is None or t.data_ptr() % HOPPER_ALIGNMENT == 0 for t in (bias, residual, next_norm))
    plan = _planned(x, weight)
    tokens, inputs = x.shape
    halves = 2 if gated else 1
    outputs = weight.shape[0] // halves
    x_map = tensor_map(x, (inputs, tokens), (x.stride(0),), (HOPPER_STEP, plan.tokens))
    weight_map = tensor_map(
        weight,
        (inputs, 8, halves, outputs // 8),
        (inputs, outputs * inputs, 8 * inputs),
        (HOPPER_STEP, 8, halves, plan.tile_rows // 8 // halves),
    )
    next_x, next_squares = (None, None) if begun is None else (begun.x, begun.squares)
    pointers = (squares, bias, residual, out, next_norm, next_x, next_squares)
    numbers = (tokens, inputs, outputs, 0 if squares is None else squares.shape[1])
    _kernel(plan, gated, x.dtype, x.device)(
        plan.programs,
        plan.threads,
        (
            x_map,
            weight_map,
            *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in pointers),
            *(ctypes.c_int(number) for number in numbers),
            ctypes.c_float(eps),
        ),
    )
