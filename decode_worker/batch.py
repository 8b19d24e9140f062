"""The running batch, resident on the device: one row per sequence, written only where something changed."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.device.device_io import copy_to_device, to_device
from decode_worker.scheduler import Sequence
from kernels.sampling import SamplingRows

# Length of a row without a sequence, which steps leave alone.
UNUSED = -1

# Columns of the buffer, of one int32 for each row; the seeds take the first two. So many that the block tables, which
# follow, begin at a multiple of 16 bytes with any number of rows.
TOKENS, LENGTHS, TEMPERATURE, TOP_P, MIN_P, TOP_K, LIMITS = range(2, 9)
COLUMNS = 12


@dataclass(frozen=True, slots=True)
class BatchState:
    """Device tensors of R rows. All but the history are views of one int32 buffer, so that one scatter writes all
    changes of a turn."""

    sampling: SamplingRows
    tokens: Tensor  # [R] int32, the token that the next step consumes
    lengths: Tensor  # [R] int32, that token's position: how many tokens have KV; or UNUSED
    limits: Tensor  # [R] int32, how many tokens may have KV: there are blocks for them, and the sequence needs it
    block_tables: Tensor  # [R, M] int32
    history: Tensor  # [R, L] int32: all tokens up to the next one; L is 0 if nothing is drafted

    def first(self, rows: int) -> "BatchState":
        """Views of the first rows."""
        return BatchState(
            self.sampling.select(lambda column: column[:rows]),
            self.tokens[:rows],
            self.lengths[:rows],
            self.limits[:rows],
            self.block_tables[:rows],
            self.history[:rows],
        )


class DecodeBatch:
    """Keeps the running sequences in the first rows: the last one takes the place of one that leaves.

    Args:
        max_rows: most sequences.
        max_blocks: blocks of the longest sequence.
        block_size: tokens in a block.
        history: tokens of a sequence that are kept on the device: those of the longest one, or none.
        device: where the batch lies.
    """

    def __init__(
        self, max_rows: int, max_blocks: int, block_size: int, device: torch.device, *, history: int = 0
    ) -> None:
        self.sequences: list[Sequence] = []
        self._device = device
        self._max_rows = max_rows
        self._max_blocks = max_blocks
        self._block_size = block_size
        self._history = history
        self._tables_at = COLUMNS * max_rows
        self._buffer = torch.zeros(self._tables_at + max_rows * max_blocks, dtype=torch.int32, device=device)
        columns = self._buffer[: self._tables_at].view(COLUMNS, max_rows)
        self.state = BatchState(
            sampling=SamplingRows(
                temperature=columns[TEMPERATURE].view(torch.float32),
                top_k=columns[TOP_K],
                top_p=columns[TOP_P].view(torch.float32),
                min_p=columns[MIN_P].view(torch.float32),
                seeds=self._buffer[: 2 * max_rows].view(torch.int64),
            ),
            tokens=columns[TOKENS],
            lengths=columns[LENGTHS],
            limits=columns[LIMITS],
            block_tables=self._buffer[self._tables_at :].view(max_rows, max_blocks),
            history=torch.zeros((max_rows, history), dtype=torch.int32, device=device),
        )
        self.state.lengths.fill_(UNUSED)
        self._row_of: dict[Sequence, int] = {}
        # What the device knows: in which row a sequence's next token lies, and how many of its blocks.
        self._device_row: dict[Sequence, int] = {}
        self._device_blocks: dict[Sequence, int] = {}
        self._changed_rows: set[int] = set()

    def __len__(self) -> int:
        return len(self.sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._row_of

    def add(self, sequence: Sequence) -> None:
        self._row_of[sequence] = len(self.sequences)
        self._changed_rows.add(len(self.sequences))
        self.sequences.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        row = self._row_of.pop(sequence)
        last = self.sequences.pop()
        if last is not sequence:
            self.sequences[row] = last
            self._row_of[last] = row
        self._changed_rows.update((row, len(self.sequences)))
        self._device_row.pop(sequence, None)
        self._device_blocks.pop(sequence, None)

    def upload(self) -> None:
        """Brings the device's rows up to date, in stream order with the steps."""
        moved = [
            (self._device_row[sequence], row)
            for row in self._changed_rows
            if row < len(self.sequences) and (sequence := self.sequences[row]) in self._device_row
        ]
        if moved:
            source, target = to_device(np.asarray(moved, dtype=np.int64).T.copy(), self._device)
            self.state.tokens[target] = self.state.tokens[source]
            self.state.lengths[target] = self.state.lengths[source]
            if self._history:
                self.state.history[target] = self.state.history[source]
        if self._history:
            self._upload_history()
        edits = [self._row_edit(row) for row in self._changed_rows]
        self._changed_rows.clear()
        edits += [self._growth_edit(sequence) for sequence in self.sequences if self._has_other_blocks(sequence)]
        if edits:
            where = np.concatenate([edit[0] for edit in edits])
            values = np.concatenate([edit[1] for edit in edits])
            self._buffer[to_device(where, self._device)] = to_device(values, self._device)

    def _upload_history(self) -> None:
        """What new sequences have said. Later the host learns that only when a step has been read, and others have been
        launched."""
        for row in self._changed_rows:
            if row < len(self.sequences) and (sequence := self.sequences[row]) not in self._device_row:
                said = np.asarray(sequence.tokens, dtype=np.int32)
                copy_to_device(said, self.state.history[row])

    def _has_other_blocks(self, sequence: Sequence) -> bool:
        return self._device_blocks[sequence] != len(sequence.blocks)

    def _growth_edit(self, sequence: Sequence) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The sequence's new blocks, if it has any, and its limit: where in the buffer, and what."""
        known = self._device_blocks[sequence]
        self._device_blocks[sequence] = len(sequence.blocks)
        row = self._row_of[sequence]
        start = self._tables_at + row * self._max_blocks
        where = [LIMITS * self._max_rows + row, *range(start + known, start + len(sequence.blocks))]
        return (
            np.asarray(where, dtype=np.int64),
            np.asarray([self._limit(sequence), *sequence.blocks[known:]], dtype=np.int32),
        )

    def _limit(self, sequence: Sequence) -> int:
        return min(len(sequence.blocks) * self._block_size, sequence.spec.max_length - 1)

    def _row_edit(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """All of a row, except what steps move on in that of a sequence that was here before: where in the buffer, and
        what."""
        rows = self._max_rows
        if row >= len(self.sequences):
            return np.asarray([LENGTHS * rows + row], dtype=np.int64), np.asarray([UNUSED], dtype=np.int32)
        sequence = self.sequences[row]
        sampling = sequence.spec.sampling
        seed = np.asarray([sampling.seed], dtype=np.uint64).view(np.int32)
        floats = np.asarray([sampling.temperature, sampling.top_p, sampling.min_p], dtype=np.float32).view(np.int32)
        table_at = self._tables_at + row * self._max_blocks
        where: list[NDArray[np.int64]] = [
            np.asarray([2 * row, 2 * row + 1, *(column * rows + row for column in range(TEMPERATURE, LIMITS + 1))]),
            np.arange(table_at, table_at + len(sequence.blocks)),
        ]
        values = [*seed, *floats, sampling.top_k, self._limit(sequence), *sequence.blocks]
        if sequence not in self._device_row:
            # The host knows where a new row is. A moved one may not have left the last step yet.
            where.append(np.asarray([TOKENS * rows + row, LENGTHS * rows + row]))
            values += (sequence.tokens[sequence.kv_len], sequence.kv_len)
        self._device_row[sequence] = row
        self._device_blocks[sequence] = len(sequence.blocks)
        return np.concatenate(where), np.asarray(values, dtype=np.int32)
