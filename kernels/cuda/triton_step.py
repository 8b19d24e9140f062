# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Bookkeeping of a decode step on CUDA, one launch before it and one after; `kernels.step` holds the references."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.triton_launch import dependent, wait_for_previous

_BLOCK = 128


@triton.jit
def _locate_kernel(
    lengths,
    block_tables,
    positions,
    slots,
    seq_lens,
    rows,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    wait_for_previous(DEPENDENT)
    length = tl.load(lengths + row, mask=inside, other=-1)
    position = tl.maximum(length, 0)
    table = block_tables + row.to(tl.int64) * table_stride
    block = tl.load(table + position // BLOCK_SIZE, mask=inside & (length >= 0), other=0).to(tl.int64)
    tl.store(positions + row, position, mask=inside)
    tl.store(slots + row, tl.where(length >= 0, block * BLOCK_SIZE + position % BLOCK_SIZE, -1), mask=inside)
    tl.store(seq_lens + row, length + 1, mask=inside)


@triton.jit
def _advance_kernel(
    tokens,
    lengths,
    history,
    drawn,
    rows,
    history_stride,
    KEEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    wait_for_previous(DEPENDENT)
    length = tl.load(lengths + row, mask=inside, other=-1)
    token = tl.load(drawn + row, mask=inside)
    tl.store(tokens + row, token, mask=inside)
    tl.store(lengths + row, length + (length >= 0).to(tl.int32), mask=inside)
    if KEEPS:
        tl.store(history + row.to(tl.int64) * history_stride + length + 1, token, mask=inside & (length >= 0))


def locate(lengths: Tensor, block_tables: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.step.locate` for CUDA tensors."""
    rows = lengths.shape[0]
    positions, seq_lens = torch.empty_like(lengths), torch.empty_like(lengths)
    slots = torch.empty(rows, dtype=torch.int64, device=lengths.device)
    if rows:
        _locate_kernel[(triton.cdiv(rows, _BLOCK),)](
            lengths,
            block_tables,
            positions,
            slots,
            seq_lens,
            rows,
            block_tables.stride(0),
            BLOCK_SIZE=block_size,
            BLOCK=_BLOCK,
            num_warps=4,
            **dependent(lengths.device),
        )
    return positions, slots, seq_lens


def advance(tokens: Tensor, lengths: Tensor, history: Tensor, drawn: Tensor) -> None:
    """`kernels.step.advance` for CUDA tensors."""
    rows = lengths.shape[0]
    if rows:
        _advance_kernel[(triton.cdiv(rows, _BLOCK),)](
            tokens,
            lengths,
            history,
            drawn,
            rows,
            history.stride(0),
            KEEPS=history.shape[1] > 0,
            BLOCK=_BLOCK,
            num_warps=4,
            **dependent(lengths.device),
        )
