"""The bookkeeping of a decode step on the device: where each sequence's next token goes, and on to the one after."""

import torch
from torch import Tensor


def locate(lengths: Tensor, block_tables: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the token that comes next in each sequence belongs.

    lengths [B] int32: tokens that have KV, or -1 where there is no sequence; block_tables [B, M] int32. Returns
    positions [B] int32 (0 without a sequence), slots [B] int64 (block * block_size + offset; -1 without a sequence),
    and seq_lens [B] int32: lengths with the token (0 without a sequence).
    """
    positions = lengths.clamp_min(0)
    block = block_tables.gather(1, (positions // block_size).long().unsqueeze(1)).squeeze(1)
    slots = torch.where(lengths >= 0, block.long() * block_size + positions % block_size, -1)
    return positions, slots, lengths + 1


def advance(tokens: Tensor, lengths: Tensor, drawn: Tensor) -> None:
    """Makes `drawn` [B] int32 the tokens that the next step consumes: tokens, lengths [B] int32, changed in place;
    lengths of -1 stay."""
    tokens.copy_(drawn)
    lengths.add_(lengths >= 0)
