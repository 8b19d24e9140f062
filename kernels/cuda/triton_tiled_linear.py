# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Linear layers of a decode batch on CUDA: tiles on the tensor cores, loaded by TMA; `kernels.linear` holds the
references.

The products of such layers are so small that a library's kernel spends as much time in its prologue and epilogue as in
the product. This one starts while the kernel before it still runs, and has bias, gated activation and residual in its
epilogue. If there are too few tiles for all SMs, several programs share a tile's inputs (split-K). The last of them to
finish adds the parts up, always in the same order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.cuda.gpu import is_hopper_or_later, multiprocessors, stages_that_fit, tma_aligned
from kernels.cuda.triton_arrivals import MAX_ARRIVALS, arrivals, is_last_to_arrive
from kernels.cuda.triton_launch import dependent, wait_for_previous

MAX_ROWS = 256
_DTYPES = (torch.bfloat16, torch.float16)
_TILE_ROWS = 64  # the M of wgmma


@triton.jit
def _finish(
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


@triton.jit(do_not_specialize=["rows"])
def _tile_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    parts,
    arrived,
    rows,
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
    """BLOCK_M rows and BLOCK_N outputs over one of SPLITS equal parts of the inputs. If GATED, SPLITS is 1. x and
    weight are TMA descriptors, whose loads are zero out of bounds. Programs that read the same weights are neighbours.
    """
    first_row = tl.program_id(0) * BLOCK_M
    first_output = tl.program_id(1) * BLOCK_N
    split = tl.program_id(2)
    row = first_row + tl.arange(0, BLOCK_M)
    output = first_output + tl.arange(0, BLOCK_N)
    part_inputs: tl.constexpr = INPUTS // SPLITS
    start = split * part_inputs
    wait_for_previous(DEPENDENT)

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_sums = sums
    for offset in tl.range(0, part_inputs, BLOCK_K, num_stages=STAGES):
        value = x.load([first_row, start + offset])
        gate = weight.load([first_output, start + offset])
        sums = tl.dot(value, gate.T, sums)
        if GATED:
            up = weight.load([OUTPUTS + first_output, start + offset])
            up_sums = tl.dot(value, up.T, up_sums)
    if SPLITS == 1:
        _finish(sums, up_sums, bias, residual, out, row, output, rows, OUTPUTS, GATED, BIAS, ADD)
    else:
        size: tl.constexpr = BLOCK_M * BLOCK_N
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        cell = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tile_parts = parts + tile.to(tl.int64) * (SPLITS * size) + cell
        tl.store(tile_parts + split * size, sums)
        if is_last_to_arrive(arrived + tile, SPLITS):
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for part in tl.static_range(SPLITS):
                # .cg: the other programs' writes are in L2, not in this SM's L1
                sums += tl.load(tile_parts + part * size, cache_modifier=".cg")
            _finish(sums, up_sums, bias, residual, out, row, output, rows, OUTPUTS, GATED, BIAS, ADD)


@dataclass(frozen=True, slots=True)
class Tile:
    """How the kernel divides its work: rows and outputs of a tile, inputs of a step, programs that share a tile's
    inputs (split-K), and pipeline stages."""

    rows: int
    outputs: int
    inputs: int
    splits: int
    stages: int


def _tile(rows: int, outputs: int, inputs: int, gated: bool, device: torch.device) -> Tile:
    """Chooses the widest tiles that still give work to two thirds of the SMs, or failing that the narrowest. Tiles of
    fewer than _TILE_ROWS rows are small enough for two programs per SM, and are chosen for twice as many."""
    matrices = 2 if gated else 1
    height: int = min(_TILE_ROWS, max(16, triton.next_power_of_2(rows)))
    room: int = multiprocessors(device) * (2 if height < _TILE_ROWS else 1)
    width = 128 // matrices

    def tiles() -> int:
        return -(-rows // height) * -(-outputs // width)

    while width > (32 if gated else 16) and tiles() < room * 2 // 3:
        width //= 2
    step = 128 if inputs % 128 == 0 and tiles() <= room else 64
    splits, steps = 1, inputs // step
    while not gated and 2 * splits * tiles() <= room and steps >= 8 * splits and steps % (2 * splits) == 0:
        splits *= 2
    stages = 4 if steps <= 8 or tiles() > room else 6
    stage_bytes = (height + width * matrices) * step * 2
    return Tile(height, width, step, splits, stages_that_fit(stages, stage_bytes, device))


def suits_tiles(x: Tensor, weight: Tensor) -> bool:
    """Whether `tiled_linear` supports this x and weight."""
    rows, inputs = x.shape
    return (
        0 < rows <= MAX_ROWS
        and (x.is_cpu or is_hopper_or_later(x.device))
        and x.dtype in _DTYPES
        and inputs % 64 == 0
        and tma_aligned(x, weight)
    )


def tiled_linear(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None, gated: bool = False
) -> Tensor:
    """x @ weight.T + bias, for inputs that `suits_tiles` accepts. All have one dtype.

    x [1 to MAX_ROWS, inputs]; weight [outputs, inputs]; bias [outputs] or None. Returns [rows, outputs]. `residual`
    [rows, outputs]: the result is added to it in place, and it is returned. gated: returns [rows, outputs / 2], SiLU of
    the first half of the outputs times the second.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0] // (2 if gated else 1)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device) if residual is None else residual
    tile = _tile(rows, outputs, inputs, gated, x.device)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs), tile.splits)
    parts = out
    if tile.splits > 1:
        assert grid[0] * grid[1] <= MAX_ARRIVALS
        parts = torch.empty((*grid, tile.rows, tile.outputs), dtype=torch.float32, device=x.device)
    _tile_kernel[grid](
        TensorDescriptor.from_tensor(x, [tile.rows, tile.inputs]),
        TensorDescriptor.from_tensor(weight, [tile.outputs, tile.inputs]),
        x if bias is None else bias,
        out,
        out,
        parts,
        arrivals(x.device),
        rows,
        OUTPUTS=outputs,
        INPUTS=inputs,
        GATED=gated,
        BIAS=bias is not None,
        ADD=residual is not None,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.inputs,
        SPLITS=tile.splits,
        STAGES=tile.stages,
        num_warps=4,
        **dependent(x.device),
    )
    return out
