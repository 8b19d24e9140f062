# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Drafts and what is kept of them on CUDA, one launch each, a program for each sequence; `kernels.drafts` holds the
references. The host knows no length, so a graph captured once serves all."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import PrefillAttention
from kernels.cuda.triton_launch import dependent, wait_for_previous
from kernels.drafts import LONGEST_MATCH, DraftedRows

_TILE = 2048  # places that are looked at together


@triton.jit
def _place_before(text, length, LONGEST: tl.constexpr, TILE: tl.constexpr):
    best = (length - 1).to(tl.int64)  # the length of a match in the upper half, its place in the lower one
    for start in range(0, length, TILE):
        place = start + tl.arange(0, TILE)
        same = place < length
        matched = tl.zeros((TILE,), dtype=tl.int64)
        for back in tl.static_range(LONGEST):
            same = same & (place >= back)
            wanted = tl.load(text + length - back, mask=length >= back, other=-1)
            same = same & (tl.load(text + place - back, mask=same, other=-1) == wanted)
            matched += same.to(tl.int64)
        best = tl.maximum(best, tl.max(tl.where(matched > 0, (matched << 32) + place, -1), axis=0))
    return (best & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _draft_kernel(
    lengths,
    limits,
    history,
    block_tables,
    tokens,
    positions,
    slots,
    owners,
    cu_query_lens,
    seq_lens,
    sequences,
    history_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    SEQUENCES_PADDED: tl.constexpr,
    LONGEST: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    sequence = tl.program_id(0)
    wait_for_previous(DEPENDENT)
    other = tl.arange(0, SEQUENCES_PADDED)
    known = tl.load(lengths + other, mask=other < sequences, other=-1)
    room = tl.load(limits + other, mask=other < sequences, other=0)
    query_lens = tl.where(known >= 0, tl.minimum(room - known, ROWS), 0)
    start = tl.sum(tl.where(other < sequence, query_lens, 0), axis=0)
    query_len = tl.sum(tl.where(other == sequence, query_lens, 0), axis=0)
    length = tl.maximum(tl.load(lengths + sequence), 0)

    if sequence == 0:
        tl.store(cu_query_lens, 0)
    tl.store(cu_query_lens + sequence + 1, start + query_len)
    tl.store(seq_lens + sequence, tl.where(query_len > 0, length + query_len, 0))

    text = history + sequence.to(tl.int64) * history_stride
    period = length - _place_before(text, length, LONGEST, TILE)
    row = tl.arange(0, ROWS_PADDED)
    mine = row < query_len
    source = length - period + 1 + tl.where(row > 0, row - 1, period - 1) % period
    token = tl.load(text + source, mask=mine)
    position = length + row
    table = block_tables + sequence.to(tl.int64) * table_stride
    block = tl.load(table + position // BLOCK_SIZE, mask=mine, other=0).to(tl.int64)
    tl.store(tokens + start + row, token, mask=mine)
    tl.store(positions + start + row, position, mask=mine)
    tl.store(slots + start + row, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=mine)
    tl.store(owners + start + row, tl.full((ROWS_PADDED,), 0, tl.int32) + sequence, mask=mine)

    # Rows that this sequence does not need are padding, after those of all sequences.
    unused = tl.sum(query_lens, axis=0) + sequence * ROWS - start + row
    padding = row < ROWS - query_len
    zeros = tl.full((ROWS_PADDED,), 0, tl.int32)
    tl.store(tokens + unused, zeros, mask=padding)
    tl.store(positions + unused, zeros, mask=padding)
    tl.store(slots + unused, zeros.to(tl.int64) - 1, mask=padding)
    tl.store(owners + unused, zeros, mask=padding)


@triton.jit
def _accept_kernel(
    tokens,
    lengths,
    history,
    row_tokens,
    cu_query_lens,
    drawn,
    kept,
    history_stride,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    sequence = tl.program_id(0)
    wait_for_previous(DEPENDENT)
    start, end = tl.load(cu_query_lens + sequence), tl.load(cu_query_lens + sequence + 1)
    row = tl.arange(0, ROWS_PADDED)
    mine = row < end - start
    new = tl.load(drawn + start + row, mask=mine, other=-1)
    behind = tl.load(row_tokens + start + row + 1, mask=row + 1 < end - start, other=-1)
    last = tl.min(tl.where(new == behind, ROWS, row), axis=0)  # a draft is never -1, and so wrong after the end
    is_kept = mine & (row <= last)
    tl.store(kept + sequence * ROWS + row, tl.where(is_kept, new, -1), mask=row < ROWS)
    if end > start:
        length = tl.load(lengths + sequence)
        text = history + sequence.to(tl.int64) * history_stride
        tl.store(text + length + 1 + row, new, mask=is_kept)
        tl.store(tokens + sequence, tl.sum(tl.where(row == last, new, 0), axis=0))
        tl.store(lengths + sequence, length + last + 1)


def draft(
    lengths: Tensor, limits: Tensor, history: Tensor, block_tables: Tensor, count: int, block_size: int
) -> DraftedRows:
    """`kernels.drafts.draft` for CUDA tensors. There are B * (count + 1) rows, of which the last may be padding."""
    sequences, device = len(lengths), lengths.device
    rows = sequences * (count + 1)
    tokens, positions, owners = torch.empty((3, rows), dtype=torch.int32, device=device)
    slots = torch.empty(rows, dtype=torch.int64, device=device)
    cu_query_lens = torch.empty(sequences + 1, dtype=torch.int32, device=device)
    seq_lens = torch.empty_like(lengths)
    _draft_kernel[(sequences,)](
        lengths,
        limits,
        history,
        block_tables,
        tokens,
        positions,
        slots,
        owners,
        cu_query_lens,
        seq_lens,
        sequences,
        history.stride(0),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        ROWS=count + 1,
        ROWS_PADDED=triton.next_power_of_2(count + 1),
        SEQUENCES_PADDED=triton.next_power_of_2(sequences),
        LONGEST=LONGEST_MATCH,
        TILE=_TILE,
        num_warps=8,
        **dependent(device),
    )
    attention = PrefillAttention((), (), cu_query_lens, seq_lens, block_tables)
    return DraftedRows(tokens, positions, slots, owners, attention)


def accept(tokens: Tensor, lengths: Tensor, history: Tensor, rows: DraftedRows, drawn: Tensor, count: int) -> Tensor:
    """`kernels.drafts.accept` for CUDA tensors."""
    kept = torch.empty((len(lengths), count + 1), dtype=torch.int32, device=lengths.device)
    _accept_kernel[(len(lengths),)](
        tokens,
        lengths,
        history,
        rows.tokens,
        rows.attention.cu_query_lens,
        drawn,
        kept,
        history.stride(0),
        ROWS=count + 1,
        ROWS_PADDED=triton.next_power_of_2(count + 1),
        num_warps=1,
        **dependent(lengths.device),
    )
    return kept
