"""Linear layers of decode batches of up to 128 tokens on Hopper GPUs, at the memory bandwidth of their weights. The
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

from kernels.cuda.cuda_kernel import (
    HOPPER_STEP_BYTES,
    CudaKernel,
    hopper_step,
    suits_hopper,
    tensor_map,
)
from kernels.cuda.gpu import multiprocessors, shared_bytes, tma_aligned
from kernels.cuda.triton_fp8 import Quantized
from kernels.fp8 import Fp8Weight, Weight
from kernels.hidden import BegunNorm, Hidden

MAX_ROWS = 128
_TILE = 64  # rows of the weight for each warpgroup: the M of wgmma
_MAX_STAGES = 16
_SHORT_RING = 8  # stages of x, enough since x comes from L2
_RING_BYTES = 192 << 10  # a larger ring would only keep the next kernel's thread blocks off the SM
_RESERVED_BYTES = 1 << 10  # of shared memory, which the system takes for each thread block
_MAX_PARTS = 16  # most partial sums of a token's squares
_VALUES = 8  # outputs that a thread writes at once
_SCALE_BYTES = 4  # float32


@dataclass(frozen=True, slots=True)
class _Plan:
    tokens: int  # of a tile
    warpgroups: int  # with _TILE rows of the weight each
    splits: int  # thread blocks that share a tile's inputs (split-K); they are a cluster
    weight_stages: int
    x_stages: int
    tiles: int
    in_blocks: bool  # whether scales come with each stage of x

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
        ring = (self.weight_stages * self.tile_rows + self.x_stages * self.tokens) * HOPPER_STEP_BYTES
        scales = self.x_stages * self.tokens * _SCALE_BYTES if self.in_blocks else 0
        barriers = 8 * (self.weight_stages + 2 * self.x_stages)
        return max(ring, sums) + scales + barriers + 4 * self.tokens


def _padded(tokens: int) -> int:
    """Tokens of a tile. Few sizes, since each is a kernel of its own."""
    return max(8, int(triton.next_power_of_2(tokens))) if tokens <= 64 else -(-tokens // 16) * 16


@cache
def _plan(tokens: int, rows: int, steps: int, in_blocks: bool, device: torch.device) -> _Plan | None:
    """The plan for a weight of so many rows, whose inputs take so many pipeline steps. None if its thread blocks do not
    all fit on the GPU at once: then a persistent kernel is faster."""
    tokens = _padded(tokens)
    processors = multiprocessors(device)
    warpgroups = 2 if rows > 2 * processors * _TILE else 1
    tiles = triton.cdiv(rows, warpgroups * _TILE)
    splits, most = 1, 8 if tokens <= 16 else 4  # the cost of adding up the splits grows with the tokens
    while 2 * splits <= most and 2 * splits * tiles <= processors and steps >= 8 * splits:
        splits *= 2
    on_a_processor = triton.cdiv(tiles * splits, processors)
    if on_a_processor > 2:
        return None
    room = min(_RING_BYTES, (shared_bytes(device) + _RESERVED_BYTES) // on_a_processor - 2048)
    own_steps = triton.cdiv(steps, splits)
    weight_bytes = warpgroups * _TILE * HOPPER_STEP_BYTES
    x_bytes = tokens * (HOPPER_STEP_BYTES + (_SCALE_BYTES if in_blocks else 0))
    weight_stages = x_stages = min(own_steps, room // (weight_bytes + x_bytes), _MAX_STAGES)
    if weight_stages < own_steps <= (room - _SHORT_RING * x_bytes) // weight_bytes:
        weight_stages, x_stages = own_steps, _SHORT_RING  # its whole part of the weight is loaded ahead of x
    assert x_stages >= min(own_steps, 2)  # a stage is released while the next one is multiplied
    return _Plan(tokens, warpgroups, splits, weight_stages, x_stages, tiles, in_blocks)


def suits_stream(x: Tensor, weight: Weight, *, gated: bool = False) -> bool:
    """Whether `streamed_linear` supports this x, which is yet to be quantized if the weight is, and weight."""
    values = _values(weight)
    return (
        0 < x.shape[0] <= MAX_ROWS
        and suits_hopper(x, values)
        and values.shape[0] % (_VALUES * (2 if gated else 1)) == 0
        and _find_plan(x.shape[0], weight) is not None
    )


def splits(x: Tensor, weight: Tensor) -> int:
    """How many thread blocks share a tile's inputs, and then have their parts to add up."""
    return _planned(x, weight).splits


def used(x: Tensor, weight: Tensor) -> float:
    """The share of the SMs that have a thread block of their own; more than 1 if some have two."""
    return _planned(x, weight).programs / multiprocessors(x.device)


def begins_norm(x: Tensor | Quantized, weight: Weight, next_norm: Tensor | None) -> bool:
    """Whether `add_streamed_linear` begins the next norm.

    With many partial sums to add up in each thread block, a norm kernel of its own takes no longer. A state times its
    norm weight may overflow float16. And before 8-bit floats, the norm's kernel is needed to quantize.
    """
    if next_norm is None or isinstance(x, Quantized) or x.dtype != torch.bfloat16:
        return False
    return _planned(x, weight).tiles <= _MAX_PARTS


@cache
def _kernel(plan: _Plan, gated: bool, fp8: bool, dtype: torch.dtype, device: torch.device) -> CudaKernel:
    macros = {
        "TOKENS": plan.tokens,
        "WARPGROUPS": plan.warpgroups,
        "SPLITS": plan.splits,
        "WEIGHT_STAGES": plan.weight_stages,
        "X_STAGES": plan.x_stages,
        "GATED": int(gated),
        "FP8": int(fp8),
        "IN_BLOCKS": int(plan.in_blocks),
    }
    return CudaKernel("streamed_linear", plan.tokens, macros, plan.shared_bytes, dtype, device)


def streamed_linear(
    x: Tensor | Quantized,
    weight: Weight,
    *,
    squares: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """x @ weight.T + bias, for inputs that `suits_stream` accepts.

    x [tokens, inputs], quantized if the weight is; weight [outputs, inputs]; bias [outputs] or None. Returns
    [tokens, outputs].

    squares: x and squares are those of a begun norm (`kernels.hidden.BegunNorm`), which is finished here with `eps`.
    gated: returns [tokens, outputs / 2], SiLU of the first half of the outputs times the second.
    """
    outputs = weight.shape[0] // (2 if gated else 1)
    out = torch.empty((_tokens(x), outputs), dtype=x.dtype, device=_values(x).device)
    _launch(x, weight, out, squares=squares, eps=eps, bias=bias, gated=gated)
    return out


def add_streamed_linear(
    states: Tensor, x: Tensor | Quantized, weight: Weight, bias: Tensor | None, next_norm: Tensor | None
) -> Hidden:
    """`kernels.linear.add_linear` to `states`, contiguous, for inputs that `suits_stream` accepts."""
    if not begins_norm(x, weight, next_norm):
        _launch(x, weight, states, bias=bias, residual=states)
        return Hidden(states)
    begun = BegunNorm(
        torch.empty_like(states),
        torch.empty((states.shape[0], _planned(x, weight).tiles), dtype=torch.float32, device=states.device),
    )
    _launch(x, weight, states, bias=bias, residual=states, next_norm=next_norm, begun=begun)
    return Hidden(states, begun)


def _values(factor: Tensor | Quantized | Fp8Weight) -> Tensor:
    return factor if isinstance(factor, Tensor) else factor.values


def _scales(factor: Tensor | Quantized | Fp8Weight) -> Tensor | None:
    return None if isinstance(factor, Tensor) else factor.scales


def _tokens(x: Tensor | Quantized) -> int:
    return x.tokens if isinstance(x, Quantized) else x.shape[0]


def _find_plan(tokens: int, weight: Weight) -> _Plan | None:
    values = _values(weight)
    rows, inputs = values.shape
    in_blocks = isinstance(weight, Fp8Weight) and weight.in_blocks
    return _plan(tokens, rows, inputs // hopper_step(values.dtype), in_blocks, values.device)


def _planned(x: Tensor | Quantized, weight: Weight) -> _Plan:
    plan = _find_plan(_tokens(x), weight)
    assert plan is not None
    return plan


def _launch(
    x: Tensor | Quantized,
    weight: Weight,
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
    assert tma_aligned(*(it for it in (bias, residual, next_norm) if it is not None))
    plan = _planned(x, weight)
    values, matrix, tokens = _values(x), _values(weight), _tokens(x)
    inputs, step = matrix.shape[1], hopper_step(matrix.dtype)
    halves = 2 if gated else 1
    outputs = matrix.shape[0] // halves
    x_map = tensor_map(values, (inputs, tokens), (values.stride(0),), (step, plan.tokens))
    weight_map = tensor_map(
        matrix,
        (inputs, 8, halves, outputs // 8),
        (inputs, outputs * inputs, 8 * inputs),
        (step, 8, halves, plan.tile_rows // 8 // halves),
    )
    next_x, next_squares = (None, None) if begun is None else (begun.x, begun.squares)
    pointers = (squares, bias, residual, out, next_norm, next_x, next_squares, _scales(x), _scales(weight))
    parts, padded = 0 if squares is None else squares.shape[1], values.shape[0]
    numbers = (tokens, inputs, outputs, parts, padded)
    _kernel(plan, gated, isinstance(weight, Fp8Weight), x.dtype, values.device)(
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
