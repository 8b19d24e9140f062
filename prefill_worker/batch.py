"""Chunks of many prompts as one packed batch: written on the host as one array, brought to the device in one copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.kv.kv_pool import blocks_for
from kernels.attention import PrefillAttention
from prefill_worker.scheduler import Chunk

_ALIGNMENT = 4  # int32 values: tensors start at multiples of 16 bytes, which kernels load fastest


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Room for a batch. What a batch does not fill is padding."""

    tokens: int  # T
    chunks: int  # B
    table_blocks: int  # M, of the longest sequence

    def holds(self, other: "BatchShape") -> bool:
        return self.tokens >= other.tokens and self.chunks >= other.chunks and self.table_blocks >= other.table_blocks

    @property
    def size(self) -> int:
        """Number of int32 values in the array that a batch of this shape is packed into."""
        return int(self._sections()[-1].stop)

    def split(self, array: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        """Views of the sections of such an array: tokens, positions, slots, rows that end a prompt, cumulative query
        lengths, KV lengths, block tables."""
        return [array[section] for section in self._sections()]

    def views(self, array: Tensor, query_lens: tuple[int, ...] = (), kv_lens: tuple[int, ...] = ()) -> "PackedBatch":
        """The batch in an array [size] int32 that `pack` has written. For the lengths see `PrefillAttention`."""
        tokens, positions, slots, last_tokens, cu_query_lens, seq_lens, tables = map(
            array.__getitem__, self._sections()
        )
        return PackedBatch(
            tokens,
            positions,
            slots,
            PrefillAttention(query_lens, kv_lens, cu_query_lens, seq_lens, tables.view(self.chunks, self.table_blocks)),
            last_tokens,
        )

    def _sections(self) -> list[slice]:
        lengths = (
            *[self.tokens] * 3,
            self.chunks,
            self.chunks + 1,
            self.chunks,
            self.chunks * self.table_blocks,
        )
        starts = accumulate((-(-length // _ALIGNMENT) * _ALIGNMENT for length in lengths), initial=0)
        return [slice(start, start + length) for start, length in zip(starts, lengths, strict=False)]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """T tokens of B chunks, packed one after another, then padding."""

    tokens: Tensor  # [T] int32
    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int32, where each token's K and V go: block * block_size + offset; padding: -1
    attention: PrefillAttention
    last_tokens: Tensor  # [B] int32, the rows that end a prompt, in order, then zeros


def exact_shape(chunks: Sequence[Chunk], block_size: int) -> BatchShape:
    """The shape that the chunks fill without padding."""
    longest = max(chunk.end for chunk in chunks)
    return BatchShape(sum(chunk.end - chunk.start for chunk in chunks), len(chunks), blocks_for(longest, block_size))


def pack(chunks: Sequence[Chunk], block_size: int, shape: BatchShape) -> NDArray[np.int32]:
    """Writes a batch that fits `shape`. Returns the array up to the last block table in use."""
    array = np.empty(shape.size, dtype=np.int32)
    tokens, positions, slots, last_tokens, cu_query_lens, seq_lens, tables = shape.split(array)
    starts = list(accumulate((chunk.end - chunk.start for chunk in chunks), initial=0))
    for row, (chunk, (start, end)) in enumerate(zip(chunks, pairwise(starts), strict=True)):
        tokens[start:end] = chunk.prompt.spec.token_ids[chunk.start : chunk.end]
        positions[start:end] = position = np.arange(chunk.start, chunk.end)
        table = np.asarray(chunk.prompt.blocks[: blocks_for(chunk.end, block_size)], dtype=np.int32)
        slots[start:end] = table[position // block_size] * block_size + position % block_size
        blocks = tables[row * shape.table_blocks : (row + 1) * shape.table_blocks]
        blocks[: len(table)], blocks[len(table) :] = table, 0
    tokens[starts[-1] :] = positions[starts[-1] :] = 0
    slots[starts[-1] :] = -1
    cu_query_lens[: len(starts)], cu_query_lens[len(starts) :] = starts, starts[-1]  # absent chunks have length 0
    seq_lens[: len(chunks)], seq_lens[len(chunks) :] = [chunk.end for chunk in chunks], 0
    ends = [end - 1 for chunk, end in zip(chunks, starts[1:], strict=True) if chunk.is_last]
    last_tokens[: len(ends)], last_tokens[len(ends) :] = ends, 0
    unused_tables = (shape.chunks - len(chunks)) * shape.table_blocks
    return array[: len(array) - unused_tables]
