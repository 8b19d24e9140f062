# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What grouped products of experts share, whatever their weights: which rows a program has, and what becomes of its
sums. `kernels.cuda.triton_experts` says how the work is divided."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


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

    def stage_bytes(self, gated: bool, itemsize: int) -> int:
        return (self.rows + self.outputs * (2 if gated else 1)) * self.inputs * itemsize

    def grid(self, choices: int, experts: int, outputs: int) -> tuple[int, int]:
        """As many programs as there could ever be work for."""
        # each expert that has any rows may leave one tile partly empty
        most = min(choices, triton.cdiv(choices, self.rows) + min(choices, experts))
        return triton.cdiv(outputs, self.outputs), most


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
