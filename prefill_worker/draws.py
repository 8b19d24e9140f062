"""How the first tokens of a batch's prompts are drawn: one array for a batch, brought to the device in one copy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.worker.sequence import SequenceSpec

COLUMNS = 7  # int32 values for each row; a seed takes two
# Columns start at multiples of this many values (16 bytes): Triton would compile a kernel again for other pointers.
ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class Draws:
    """The arguments of `kernels.sampling.sample` for R rows; views of one array."""

    seeds: Tensor  # [R] int64
    temperature: Tensor  # [R] float32
    top_p: Tensor  # [R] float32
    min_p: Tensor  # [R] float32
    top_k: Tensor  # [R] int32
    positions: Tensor  # [R] int32


def pack(specs: Sequence[SequenceSpec], rows: int) -> NDArray[np.int32]:
    """An array [size(rows)]: one row for each prompt, and greedy rows as padding."""
    array = np.zeros((COLUMNS, _width(rows)), dtype=np.int32)
    params = [spec.sampling for spec in specs]
    count = len(specs)
    seeds = np.asarray([p.seed for p in params], dtype=np.uint64)
    array[:2].reshape(-1)[: 2 * count] = seeds.view(np.int32)
    floats = np.asarray([(p.temperature, p.top_p, p.min_p) for p in params], dtype=np.float32).reshape(-1, 3)
    array[2:5, :count] = floats.view(np.int32).T
    array[5, :count] = [p.top_k for p in params]
    array[6, :count] = [len(spec.token_ids) for spec in specs]
    return array.reshape(-1)


def size(rows: int) -> int:
    """Number of int32 values in the array for this many rows."""
    return COLUMNS * _width(rows)


def views(array: Tensor, rows: int) -> Draws:
    """The draws in the first `size(rows)` values of an array that `pack` wrote, on any device."""
    columns = array[: size(rows)].view(COLUMNS, -1)
    seeds = columns[:2].reshape(-1).view(torch.int64)
    temperature, top_p, min_p = columns[2:5, :rows].view(torch.float32)
    return Draws(seeds[:rows], temperature, top_p, min_p, columns[5, :rows], columns[6, :rows])


def _width(rows: int) -> int:
    return -(-rows // ALIGNMENT) * ALIGNMENT
