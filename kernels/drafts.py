"""Speculative decoding without a second model: drafts are copied from what the sequence already says, all of them go
through the model in one pass, and the first ones are kept, for as long as the model would have chosen the same.

Drafts from the sequence: Yang et al., "Inference with Reference: Lossless Acceleration of Large Language Models", 2023;
Saxena, "Prompt Lookup Decoding", 2023. Comparing choices suffices, also if they are sampled, since what is drawn at a
position depends on logits, seed and position alone.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.attention import PrefillAttention

# Most tokens of a sequence's end that are looked for in what is before it.
LONGEST_MATCH = 4


@dataclass(frozen=True, slots=True)
class DraftedRows:
    """The next token of B sequences and its drafts: T rows, one sequence after another, then maybe padding."""

    tokens: Tensor  # [T] int32
    positions: Tensor  # [T] int32; padding: 0
    slots: Tensor  # [T] int64, where K and V go: block * block_size + offset; padding: -1
    owners: Tensor  # [T] int32, whose row it is; padding: 0
    attention: PrefillAttention


def draft(
    lengths: Tensor, limits: Tensor, history: Tensor, block_tables: Tensor, count: int, block_size: int
) -> DraftedRows:
    """Drafts up to `count` tokens behind the next token of each sequence.

    lengths [B] int32: tokens that have KV already, -1 in a row without a sequence; limits [B] int32, > lengths: the
    most that may have it; history [B, L] int32: the first lengths + 1 are the sequence's tokens, up to the next one;
    block_tables [B, M] int32: blocks for limits tokens.

    The drafts are what followed when the sequence's end, or the longest part of it of up to `LONGEST_MATCH` tokens that
    was there before, was there last. If that runs into the end, it goes on as that would: the same tokens over again.
    Where not even the last token was there before, it is repeated.
    """
    parts: list[tuple[Tensor, ...]] = []
    query_lens, kv_lens = [], []
    for row, (length, limit) in enumerate(zip(lengths.tolist(), limits.tolist(), strict=True)):
        query_len = min(count + 1, limit - length) if length >= 0 else 0
        query_lens.append(query_len)
        kv_lens.append(length + query_len if query_len else 0)
        if not query_len:
            continue
        text = history[row, : length + 1]
        period = length - _place_before(text)
        positions = torch.arange(length, length + query_len)
        tokens = text[length - period + 1 + (positions - 1 - length) % period]
        blocks = block_tables[row, positions // block_size].long()
        parts.append((tokens, positions, blocks * block_size + positions % block_size, torch.full((query_len,), row)))
    tokens_, positions_, slots, owners = (torch.cat(part) for part in zip(*parts, strict=True))
    cu_query_lens = torch.tensor([0, *query_lens]).cumsum(0).int()
    attention = PrefillAttention(
        tuple(query_lens), tuple(kv_lens), cu_query_lens, torch.tensor(kv_lens).int(), block_tables
    )
    return DraftedRows(tokens_.int(), positions_.int(), slots, owners.int(), attention)


def _place_before(text: Tensor) -> int:
    """The index at which the longest part of the end of `text` that was there before ended last; if none was, that
    before the end."""
    last = len(text) - 1
    found = last - 1
    same = torch.ones(last, dtype=torch.bool)  # whether the tokens up to each index are those up to the end
    for back in range(min(LONGEST_MATCH, last)):
        same[:back] = False
        same[back:] &= text[: last - back] == text[last - back]
        places = same.nonzero()
        if not len(places):
            break
        found = int(places[-1])
    return found


def accept(tokens: Tensor, lengths: Tensor, history: Tensor, rows: DraftedRows, drawn: Tensor, count: int) -> Tensor:
    """Keeps of each sequence the drafts that were drawn, up to the first that was not, and what was drawn there.

    tokens [B] int32: each sequence's next one; lengths [B] int32 and history [B, L] int32, as `draft` had them. All
    three move on in place. rows: what it returned for `count`. drawn [T] int32: what the model would have follow each
    row. Returns the new tokens [B, count + 1] int32, then -1.
    """
    kept = torch.full((len(lengths), count + 1), -1, dtype=torch.int32, device=lengths.device)
    ends = rows.attention.cu_query_lens.tolist()
    for row, (start, end) in enumerate(pairwise(ends)):
        if start == end:
            continue
        wrong = (rows.tokens[start + 1 : end] != drawn[start : end - 1]).nonzero()
        new = drawn[start : start + (int(wrong[0]) + 1 if len(wrong) else end - start)]
        length = int(lengths[row])
        kept[row, : len(new)] = new
        history[row, length + 1 : length + 1 + len(new)] = new
        tokens[row] = new[-1]
        lengths[row] = length + len(new)
    return kept
