# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Linear layers of one to four rows on CUDA, which take as long as reading their weights; `kernels.linear` holds the
references.

No tensor cores: a program owns a few outputs, and reads their weight rows, which are contiguous, in full. Norm, gated
activation, bias and residual are fused. A program loads its weights before the kernel ahead of it has ended, as they
depend on nothing.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.gpu import multiprocessors
from kernels.cuda.triton_launch import dependent, prefetch_to_l2, wait_for_previous

MAX_ROWS = 4
_WARP_INPUTS = 256  # inputs that a warp reads at a time: 16 bytes a thread
_PROGRAM_WEIGHTS = 1 << 14  # elements of the weight that a program holds at a time
_ONE_STEP = 1 << 23  # elements of a weight, up to which all programs run at once


@triton.jit
def _few_rows_kernel(
    x,
    norm,
    weight,
    bias,
    residual,
    out,
    rows,
    x_stride,
    eps,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_N outputs of all rows. If GATED, BLOCK_N of gate and of up, which have OUTPUTS each.

    A step's weights are a block [BLOCK_N, CHUNKS, LANES]. LANES inputs are what one warp reads at a time, so that an
    output's sum stays within a warp.
    """
    step: tl.constexpr = CHUNKS * LANES
    size: tl.constexpr = OUTPUTS * INPUTS
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = (output < OUTPUTS)[:, None]
    member = tl.arange(0, ROWS)[None, :]
    column = tl.arange(0, CHUNKS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    at = weight + (output.to(tl.int64) * INPUTS)[:, None, None] + column[None, :, :]
    mask = exists[:, :, None] & (column < INPUTS)[None, :, :]
    gate = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    up = gate
    if GATED:
        up = tl.load(at + size, mask=mask, other=0.0, eviction_policy="evict_first")
    if DEPENDENT and step < INPUTS and OUTPUTS % BLOCK_N == 0 and BLOCK_N * INPUTS % 8 == 0:
        slab = weight + tl.program_id(0).to(tl.int64) * (BLOCK_N * INPUTS)
        slab_bytes: tl.constexpr = BLOCK_N * INPUTS * (weight.dtype.element_ty.primitive_bitwidth // 8)
        prefetch_to_l2(slab, slab_bytes)
        if GATED:
            prefetch_to_l2(slab + size, slab_bytes)

    cell = exists & (member < rows)
    out_at = member.to(tl.int64) * OUTPUTS + output[:, None]
    wait_for_previous(DEPENDENT)
    if ADD:
        added = tl.load(residual + out_at, mask=cell, other=0.0).to(tl.float32)
    gate_sums = tl.zeros((BLOCK_N, ROWS), tl.float32)
    up_sums = tl.zeros((BLOCK_N, ROWS), tl.float32)
    squares = tl.zeros((1, ROWS), tl.float32)
    for first in tl.range(0, INPUTS, step):
        # software pipelining: the next step's loads are in flight while this step's arrive
        next_mask = exists[:, :, None] & (first + step + column < INPUTS)[None, :, :]
        next_gate = tl.load(at + first + step, mask=next_mask, other=0.0, eviction_policy="evict_first")
        next_up = next_gate
        if GATED:
            next_up = tl.load(at + size + first + step, mask=next_mask, other=0.0, eviction_policy="evict_first")
        inside = first + column < INPUTS
        if NORM:
            scale = tl.load(norm + first + column, mask=inside, other=0.0).to(tl.float32)
        for index in tl.static_range(ROWS):
            value = tl.load(x + index * x_stride + first + column, mask=inside & (index < rows), other=0.0)
            value = value.to(tl.float32)
            if NORM:
                squares += tl.where(member == index, tl.sum(value * value), 0.0)
                value *= scale
            part = tl.sum(tl.sum(gate.to(tl.float32) * value[None, :, :], axis=1), axis=1)
            gate_sums += tl.where(member == index, part[:, None], 0.0)
            if GATED:
                part = tl.sum(tl.sum(up.to(tl.float32) * value[None, :, :], axis=1), axis=1)
                up_sums += tl.where(member == index, part[:, None], 0.0)
        gate = next_gate
        up = next_up
    result = gate_sums
    if NORM:
        # the norm scales a whole row by one factor, so the sums can be scaled instead
        inverse = tl.rsqrt(squares / INPUTS + eps)
        result *= inverse
        up_sums *= inverse
    if BIAS:
        result += tl.load(bias + output, mask=output < OUTPUTS, other=0.0).to(tl.float32)[:, None]
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * up_sums
    if ADD:
        result += added
    tl.store(out + out_at, result.to(out.dtype.element_ty), mask=cell)


@dataclass(frozen=True, slots=True)
class Cut:
    """How the kernel divides its work: outputs of a program, inputs of a step, and warps."""

    outputs: int
    inputs: int
    warps: int


def _cut(outputs: int, inputs: int, gated: bool, device: torch.device) -> Cut:
    """A small weight is read in one step, so that no load waits for another. Otherwise steps are small enough to hold
    the next step's weights as well. A program gets fewer outputs only if there would not be one program per SM."""
    matrices = 2 if gated else 1
    step, held = max(1024, triton.next_power_of_2(inputs)), _PROGRAM_WEIGHTS
    if step * matrices > held or (step > 1024 and matrices * outputs * inputs > _ONE_STEP):
        step, held = 1024, held // 2
    each = held // step // matrices
    while each > 1 and triton.cdiv(outputs, each) < multiprocessors(device) * 31 // 32:
        each //= 2
    return Cut(each, step, 4)


def few_rows_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """rms_norm(x) @ weight.T + bias. All have one dtype, and contiguous last dimensions.

    x [1 to MAX_ROWS, inputs]; weight [outputs, inputs]; norm [inputs], or None for x as it is; bias [outputs] or None.
    Returns [rows, outputs]. `residual` [rows, outputs]: the result is added to it in place, and it is returned. gated:
    returns [rows, outputs / 2], SiLU of the first half of the outputs times the second.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0] // (2 if gated else 1)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device) if residual is None else residual
    cut = _cut(outputs, inputs, gated, x.device)
    _few_rows_kernel[(triton.cdiv(outputs, cut.outputs),)](
        x,
        x if norm is None else norm,
        weight,
        x if bias is None else bias,
        out,
        out,
        rows,
        x.stride(0),
        eps,
        OUTPUTS=outputs,
        INPUTS=inputs,
        ROWS=triton.next_power_of_2(rows),
        NORM=norm is not None,
        GATED=gated,
        BIAS=bias is not None,
        ADD=residual is not None,
        BLOCK_N=cut.outputs,
        CHUNKS=cut.inputs // _WARP_INPUTS,
        LANES=_WARP_INPUTS,
        num_warps=cut.warps,
        **dependent(x.device),
    )
    return out
