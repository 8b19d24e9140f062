"""Linear layers of decode batches of up to 64 tokens on Hopper GPUs, at the memory bandwidth of their weights. The
kernel is in streamed_linear.cu; `kernels.linear` holds the references.

With few tokens, a product takes as long as reading its weight. A library's kernel begins to read when the kernel before
it has ended. This one uses programmatic dependent launch: while the kernel before it still runs, it fills shared memory
with its weight. Bias, gated activation and residual are part of the epilogue. If there are too few tiles for all SMs,
the thread blocks of a cluster share a tile (split-K) and add up their parts through DSMEM. It is written in CUDA C++,
since Triton offers no clusters and no control over what is loaded before a kernel waits.

Between two such layers the norm needs no launch of its own: see `kernels.hidden`.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from kernels.cuda.cuda_kernel import HOPPER_ALIGNMENT, HOPPER_STEP, CudaKernel, suits_hopper, tensor_map
from kernels.cuda.triton_launch import multiprocessors, shared_bytes
from kernels.hidden import BegunNorm, Hidden

MAX_ROWS = 64
_TILE = 64  # rows of the weight for each warpgroup: the M of wgmma
_MAX_STAGES = 16
_SHORT_RING = 8  # stages of x, enough since x comes from L2
_RING_BYTES = 192 << 10  # a larger ring would only keep the next kernel's thread blocks off the SM
_RESERVED_BYTES = 1 << 10  # of shared memory, which the system takes for each thread block
_MAX_PARTS = 16  # most partial sums of a token's squares
_VALUES = 8  # outputs that a thread writes at once


@dataclass(frozen=True, slots=True)
class _Plan:
    tokens: int  # of a tile
    warpgroups: int  # with _TILE rows of the weight each
    splits: int  # thread blocks that share a tile's inputs (split-K); they are a cluster
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
    """The plan for a weight of so many rows and inputs. None if its thread blocks do not all fit on the GPU at once:
    then a persistent kernel is faster."""
    tokens = max(8, triton.next_power_of_2(tokens))
    processors = multiprocessors(device)
    warpgroups = 2 if rows > 2 * processors * _TILE else 1
    tiles = triton.cdiv(rows, warpgroups * _TILE)
    steps = inputs // HOPPER_STEP
    splits, most = 1, 8 if tokens <= 16 else 4  # the cost of adding up the splits grows with the tokens
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
        weight_stages, x_stages = own_steps, _SHORT_RING  # its whole part of the weight is loaded ahead of x
    assert x_stages >= min(own_steps, 2)  # a stage is released while the next one is multiplied
    return _Plan(tokens, warpgroups, splits, weight_stages, x_stages, tiles)


def suits_stream(x: Tensor, weight: Tensor, *, gated: bool = False) -> bool:
    """Whether `streamed_linear` supports this x and weight."""
    tokens, inputs = x.shape
    rows = weight.shape[0]
    return (
        0 < tokens <= MAX_ROWS
        and suits_hopper(x, weight)
        and rows % (_VALUES * (2 if gated else 1)) == 0
        and _plan(tokens, rows, inputs, x.device) is not None
    )


def splits(x: Tensor, weight: Tensor) -> int:
    """How many thread blocks share a tile's inputs, and then have their parts to add up."""
    return _planned(x, weight).splits


def begins_norm(x: Tensor, weight: Tensor, next_norm: Tensor | None) -> bool:
    """Whether `add_streamed_linear` begins the next norm.

    With many partial sums to add up in each thread block, a norm kernel of its own takes no longer. And a state times
    its norm weight may overflow float16.
    """
    return next_norm is not None and x.dtype == torch.bfloat16 and _planned(x, weight).tiles <= _MAX_PARTS


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
    """x @ weight.T + bias, for inputs that `suits_stream` accepts.

    x [1 to MAX_ROWS, inputs]; weight [outputs, inputs]; bias [outputs] or None. Returns [rows, outputs].

    squares: x and squares are those of a begun norm (`kernels.hidden.BegunNorm`), which is finished here with `eps`.
    gated: returns [rows, outputs / 2], SiLU of the first half of the outputs times the second.
    """
    outputs = weight.shape[0] // (2 if gated else 1)
    out = torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
    _launch(x, weight, out, squares=squares, eps=eps, bias=bias, gated=gated)
    return out


def add_streamed_linear(
    states: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, next_norm: Tensor | None
) -> Hidden:
    """`kernels.linear.add_linear` to `states`, contiguous, for inputs that `suits_stream` accepts."""
    if not begins_norm(x, weight, next_norm):
        _launch(x, weight, states, bias=bias, residual=states)
        return Hidden(states)
    begun = BegunNorm(
        torch.empty_like(states),
        torch.empty((x.shape[0], _planned(x, weight).tiles), dtype=torch.float32, device=x.device),
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
