"""Bookkeeping of a decode step, on the device: where each sequence's next token goes, and the move to the one after."""

import torch
from torch import Tensor


def locate(lengths: Tensor, block_tables: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each sequence's next token goes.

    lengths [B] int32: tokens that have KV already, -1 in a row without a sequence; block_tables [B, M] int32.

    Returns positions [B] int32 (0 in a row without a sequence), slots [B] int64 (block * block_size + offset; -1), and
    seq_lens [B] int32, the lengths with the new token (0).
    """
    positions = lengths.clamp_min(0)
    block = block_tables.gather(1, (positions // block_size).long().unsqueeze(1)).squeeze(1)
    slots = torch.where(lengths >= 0, block.long() * block_size + positions % block_size, -1)
    return positions, slots, lengths + 1


def advance(tokens: Tensor, lengths: Tensor, history: Tensor, drawn: Tensor) -> None:
    """Makes `drawn` [B] int32 the input tokens of the next step. Changes tokens and lengths, [B] int32, in place;
    a length of -1 (no sequence) stays. history [B, L] int32: the sequences' tokens, which drawn is added to, after the
    first lengths + 1; if L is 0 they are not kept."""
    tokens.copy_(drawn)
    there = lengths >= 0
    lengths.add_(there)
    if history.shape[1]:
        rows = there.nonzero().squeeze(1)
        history[rows, lengths[rows].long()] = drawn[rows]
