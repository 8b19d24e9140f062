# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What grouped products of experts share, whatever their weights: which rows a program has, and what becomes of its
sums. `kernels.cuda.triton_experts` says how the work is divided."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.gpu import stages_that_fit
from kernels.cuda.triton_launch import dependent


@dataclass(frozen=True, slots=True)
class Choices:
    """Which expert each row goes through: all choices of all tokens, in their own order and sorted by expert."""

    shares: Tensor  # [T, k] float32
    order: Tensor  # [T * k] int32: numbers of choices, sorted
    starts: Tensor  # [E + 1] int32: which part of `order` is an expert's


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and outputs of a program, inputs of a step, pipeline stages, and warps."""

    rows: int
    outputs: int
    inputs: int
    stages: int
    warps: int

    def grid(self, choices: int, experts: int, outputs: int) -> tuple[int, int]:
        """As many programs as there could ever be work for."""
        # each expert that has any rows may leave one tile partly empty
        most = min(choices, triton.cdiv(choices, self.rows) + min(choices, experts))
        return triton.cdiv(outputs, self.outputs), most

    def stages_on(self, device: torch.device, gated: bool, itemsize: int) -> int:
        """Those of the tile, or as many as fit: most GPUs have less shared memory than an H100."""
        stage_bytes = (self.rows + self.outputs * (2 if gated else 1)) * self.inputs * itemsize
        return stages_that_fit(self.stages, stage_bytes, device)


def constants(tile: Tile, choices: Choices, weight: Tensor, out: Tensor, gated: bool) -> dict[str, Any]:
    """What a kernel of grouped products is compiled for, and how it is launched. weight [E, N, K]; out [T * k, N], or
    half of N if gated."""
    experts, _, inputs = weight.shape
    return {
        "EXPERTS": experts,
        "PER_TOKEN": choices.shares.shape[1],
        "OUTPUTS": out.shape[1],
        "INPUTS": inputs,
        "GATED": gated,
        "BLOCK_E": triton.next_power_of_2(experts),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.outputs,
        "BLOCK_K": tile.inputs,
        "STAGES": tile.stages_on(out.device, gated, weight.itemsize),
        "num_warps": tile.warps,
        **dependent(out.device),
    }


@triton.jit
def locate(starts, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of this program, and which of its tiles of BLOCK_M rows. EXPERTS: there is no work for it."""
    tile = tl.program_id(1)
    candidate = tl.arange(0, BLOCK_E)
    known = candidate < EXPERTS
    start = tl.load(starts + candidate, mask=known, other=0)
    end = tl.load(starts + candidate + 1, mask=known, other=0)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((known & (tl.cumsum(tiles) <= tile)).to(tl.int32))
    return expert, tile - tl.sum(tl.where(candidate < expert, tiles, 0))


@triton.jit
def rows_of(starts, order, expert, place, BLOCK_M: tl.constexpr):
    """The rows of the tile that `locate` found, in sorted order; which of them are the expert's; and their choices."""
    row = tl.load(starts + expert) + place * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tl.load(starts + expert + 1)
    return row, valid, tl.load(order + row, mask=valid, other=0)


@triton.jit
def finish(sums, up_sums, shares, out, row, choice, valid, output, OUTPUTS: tl.constexpr, GATED: tl.constexpr):
    """Stores SiLU(sums) * up_sums in sorted order if GATED, else sums * share in the choices' own order."""
    if GATED:
        sums = sums / (1.0 + tl.exp(-sums)) * up_sums
        target = row
    else:
        sums *= tl.load(shares + choice, mask=valid, other=0.0)[:, None]
        target = choice
    at = target.to(tl.int64)[:, None] * OUTPUTS + output[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=valid[:, None] & (output < OUTPUTS)[None, :])
