"""How the first tokens of a batch's prompts are drawn: one array for a batch, brought to the device in one copy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.sequence import SequenceSpec
from kernels.sampling import SamplingRows

# Columns of the array, of one int32 for each row; the seeds take the first two.
TEMPERATURE, TOP_P, MIN_P, TOP_K, POSITIONS = range(2, 7)
COLUMNS = 7
# Columns start at multiples of this many values (16 bytes): Triton would compile a kernel again for other pointers.
ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class Draws:
    """What `kernels.sampling.sample` wants to know of R rows; views of one array."""

    rows: SamplingRows
    positions: Tensor  # [R] int32


def pack(specs: Sequence[SequenceSpec], rows: int) -> NDArray[np.int32]:
    """An array [size(rows)]: one row for each prompt, and greedy rows as padding."""
    array = np.zeros((COLUMNS, _width(rows)), dtype=np.int32)
    params = [spec.sampling for spec in specs]
    count = len(specs)
    seeds = np.asarray([p.seed for p in params], dtype=np.uint64)
    array[:2].reshape(-1)[: 2 * count] = seeds.view(np.int32)
    floats = np.asarray([(p.temperature, p.top_p, p.min_p) for p in params], dtype=np.float32).reshape(-1, 3)
    array[TEMPERATURE:TOP_K, :count] = floats.view(np.int32).T
    array[TOP_K, :count] = [p.top_k for p in params]
    array[POSITIONS, :count] = [len(spec.token_ids) for spec in specs]
    return array.reshape(-1)


def size(rows: int) -> int:
    """Number of int32 values in the array for this many rows."""
    return COLUMNS * _width(rows)


def views(array: Tensor, rows: int) -> Draws:
    """The draws in the first `size(rows)` values of an array that `pack` wrote, on any device."""
    columns = array[: size(rows)].view(COLUMNS, -1)
    sampling = SamplingRows(
        temperature=columns[TEMPERATURE, :rows].view(torch.float32),
        top_k=columns[TOP_K, :rows],
        top_p=columns[TOP_P, :rows].view(torch.float32),
        min_p=columns[MIN_P, :rows].view(torch.float32),
        seeds=columns[:2].reshape(-1).view(torch.int64)[:rows],
    )
    return Draws(sampling, columns[POSITIONS, :rows])


def _width(rows: int) -> int:
    return -(-rows // ALIGNMENT) * ALIGNMENT
