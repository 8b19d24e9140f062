# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Linear layers of few rows on CUDA, where all the time goes into reading the weights; `kernels.linear` holds the
references.

One to four rows: products and sums on the ordinary units. A program owns a few outputs and reads their weights, which
lie end to end, in full; norm, gated activation, bias and residual happen on the way, so that a layer needs four
launches of this. Up to 64 rows: tiles on the matrix units, the input split over several programs where there are too
few outputs for all multiprocessors, with the norm in a launch of its own. Above that the product is the library's.

Either kernel asks for its weights before the kernel ahead of it has ended: they depend on nothing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_activation import silu_mul
from kernels.triton_launch import MAX_ARRIVALS, arrivals, dependent, multiprocessors, prefetch_to_l2, wait_for_previous
from kernels.triton_norm import rms_norm

_FEW = 4  # rows
_WARP_INPUTS = 256  # that a warp reads at a time: 16 bytes a thread
_MAX_TILE_ROWS = 64
# Elements of a weight up to which own kernels beat the library at more than one row.
_SMALL_WEIGHT = 1 << 23
_TILE_DTYPES = (torch.bfloat16, torch.float16)


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
    """BLOCK_N outputs of all rows; GATED: so many of gate and of up, of OUTPUTS each.

    A step's weights are a block [BLOCK_N, CHUNKS, LANES]: LANES inputs are what one warp reads at a time, so that an
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
    if ADD:
        # written before the layer that made x, so at least two launches back
        added = tl.load(residual + out_at, mask=cell, other=0.0, cache_modifier=".cg").to(tl.float32)
    wait_for_previous(DEPENDENT)
    gate_sums = tl.zeros((BLOCK_N, ROWS), tl.float32)
    up_sums = tl.zeros((BLOCK_N, ROWS), tl.float32)
    squares = tl.zeros((1, ROWS), tl.float32)
    for first in tl.range(0, INPUTS, step):
        # for the next step, so that a step's loads are on their way while the last one's arrive
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
        # the norm divides a whole row, so it may as well divide the sums
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


@triton.jit
def _finish_tile(
    sums,
    up_sums,
    bias,
    residual,
    out,
    row,
    output,
    rows,
    OUTPUTS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    cell = (row < rows)[:, None] & (output < OUTPUTS)[None, :]
    at = row.to(tl.int64)[:, None] * OUTPUTS + output[None, :]
    if BIAS:
        sums += tl.load(bias + output, mask=output < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    if GATED:
        sums = sums / (1.0 + tl.exp(-sums)) * up_sums
    if ADD:
        sums += tl.load(residual + at, mask=cell, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=cell)


@triton.jit
def _tile_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    parts,
    arrived,
    rows,
    x_stride,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_N outputs of all rows over one of SPLITS parts of the inputs, a multiple of BLOCK_K; GATED: SPLITS is 1."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    output = tile * BLOCK_N + lane
    column = tl.arange(0, BLOCK_K)
    steps: tl.constexpr = INPUTS // BLOCK_K
    start = split * steps // SPLITS * BLOCK_K
    end = (split + 1) * steps // SPLITS * BLOCK_K
    weight_at = weight + output.to(tl.int64)[:, None] * INPUTS + column[None, :]
    if DEPENDENT:
        width: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
        if SPLITS == 1 and OUTPUTS % BLOCK_N == 0:
            slab = weight + tile.to(tl.int64) * (BLOCK_N * INPUTS)
            prefetch_to_l2(slab, BLOCK_N * INPUTS * width)
            if GATED:
                prefetch_to_l2(slab + OUTPUTS * INPUTS, BLOCK_N * INPUTS * width)
        elif OUTPUTS % BLOCK_N == 0:
            for index in tl.range(0, BLOCK_N):
                slab = weight + (tile * BLOCK_N + index).to(tl.int64) * INPUTS + start
                prefetch_to_l2(slab, (end - start) * width)
    wait_for_previous(DEPENDENT)

    x_at = x + row.to(tl.int64)[:, None] * x_stride + column[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_sums = sums
    for first in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        value = tl.load(x_at + first, mask=(row < rows)[:, None], other=0.0)
        gate = tl.load(weight_at + first, mask=(output < OUTPUTS)[:, None], other=0.0, eviction_policy="evict_first")
        sums = tl.dot(value, tl.trans(gate), sums)
        if GATED:
            up_at = weight_at + OUTPUTS * INPUTS + first
            up = tl.load(up_at, mask=(output < OUTPUTS)[:, None], other=0.0, eviction_policy="evict_first")
            up_sums = tl.dot(value, tl.trans(up), up_sums)
    if SPLITS == 1:
        _finish_tile(sums, up_sums, bias, residual, out, row, output, rows, OUTPUTS, GATED, BIAS, ADD)
    else:
        cell = row[:, None] * BLOCK_N + lane[None, :]
        tile_parts = parts + tile.to(tl.int64) * (SPLITS * BLOCK_M * BLOCK_N) + cell
        tl.store(tile_parts + split * (BLOCK_M * BLOCK_N), sums)
        # all threads' parts are written before the release by the thread that counts; the last one acquires them all
        tl.debug_barrier()
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrived + tile, 0)
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for part in tl.static_range(SPLITS):
                # .cg: from L2, where the other programs' writes are
                sums += tl.load(tile_parts + part * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
            _finish_tile(sums, up_sums, bias, residual, out, row, output, rows, OUTPUTS, GATED, BIAS, ADD)


@dataclass(frozen=True, slots=True)
class FewRows:
    """How the kernel of few rows cuts its work: outputs of a program, inputs of a step, warps."""

    outputs: int
    inputs: int
    warps: int


@dataclass(frozen=True, slots=True)
class Tile:
    """How the tile kernel cuts its work: outputs of a program, inputs of a step, programs that share a tile's inputs,
    warps, and pipeline stages."""

    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int


def _few_rows(outputs: int, inputs: int, gated: bool, device: torch.device) -> FewRows:
    """A step of 32 kB of weights (half, where the next step's are on their way beside it), less only where there would
    not be a program for each multiprocessor."""
    wanted = multiprocessors(device) * 31 // 32
    each = (8 if gated else 16) // (1 if inputs <= 1024 else 2)
    while each > 1 and triton.cdiv(outputs, each) < wanted:
        each //= 2
    return FewRows(each, 1024, 4)


def _tile(rows: int, outputs: int, inputs: int, gated: bool, device: torch.device) -> Tile | None:
    """None: the library's product is the faster one, as it was measured on an H100 (docs/kernels.md)."""
    if inputs % 64 or rows > _MAX_TILE_ROWS or outputs * inputs * (2 if gated else 1) > _SMALL_WEIGHT:
        return None
    step = 128 if inputs % 128 == 0 else 64
    each = 32 if gated else 16
    tiles = triton.cdiv(outputs, each)
    splits = 1
    while not gated and tiles * splits <= multiprocessors(device) and 2 * splits <= min(8, inputs // step // 4):
        splits *= 2
    if splits > 1 and tiles > MAX_ARRIVALS:
        return None
    return Tile(each, step, splits, 4, 4)


def _launch(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor | None:
    """The product of few rows with all that goes with it, or None where it is for the library."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // (2 if gated else 1)
    few = rows <= _FEW and (rows == 1 or weight.numel() <= _SMALL_WEIGHT)
    tile = None if few else _tile(rows, outputs, inputs, gated, x.device)
    if rows == 0 or not (few or (tile is not None and x.dtype in _TILE_DTYPES)):
        return None
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device) if residual is None else residual
    if few:
        cut = _few_rows(outputs, inputs, gated, x.device)
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
    elif tile is not None:
        if norm is not None:
            x = rms_norm(x, norm, eps, weight)
        tiles = triton.cdiv(outputs, tile.outputs)
        block_rows = max(16, triton.next_power_of_2(rows))
        parts = out
        if tile.splits > 1:
            parts = torch.empty((tiles, tile.splits, block_rows, tile.outputs), dtype=torch.float32, device=x.device)
        _tile_kernel[(tiles, tile.splits)](
            x,
            weight,
            x if bias is None else bias,
            out,
            out,
            parts,
            arrivals(x.device),
            rows,
            x.stride(0),
            OUTPUTS=outputs,
            INPUTS=inputs,
            GATED=gated,
            BIAS=bias is not None,
            ADD=residual is not None,
            BLOCK_M=block_rows,
            BLOCK_N=tile.outputs,
            BLOCK_K=tile.inputs,
            SPLITS=tile.splits,
            STAGES=tile.stages,
            num_warps=tile.warps,
            **dependent(x.device),
        )
    return out


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.linear.norm_linear` for CUDA tensors; x's last dimension and the weight are contiguous."""
    out = _launch(x, weight, norm=norm, eps=eps, bias=bias)
    return F.linear(rms_norm(x, norm, eps), weight, bias) if out is None else out


def norm_gated_linear(x: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> Tensor:
    """`kernels.linear.norm_gated_linear` for CUDA tensors; x's last dimension and gate_up are contiguous."""
    out = _launch(x, gate_up, norm=norm, eps=eps, gated=True)
    return silu_mul(F.linear(rms_norm(x, norm, eps), gate_up)) if out is None else out


def add_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.linear.add_linear` for CUDA tensors; x's last dimension and the weight are contiguous. The kernel before
    this one, which may still run, must not write `residual`; it may write x."""
    if _launch(x, weight, bias=bias, residual=residual) is None:
        residual.addmm_(x, weight.t())
        if bias is not None:
            residual.add_(bias)
    return residual
