"""Attention over a paged KV cache: the torch references, and the CPU path.

A cache holds blocks of `block_size` tokens; a block table names a sequence's blocks in order (PagedAttention: Kwon et
al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023, section 4.1).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8 import widened
from kernels.rope import Rotation, rope_write_kv

_GATHERED_TOKENS = 4096

# A prefill batch of up to FEW_TOKENS tokens, in which no sequence is longer than SHORT_TOKENS, has block tables that
# are just wide enough for SHORT_TOKENS. That tells a kernel that one small launch is fastest.
FEW_TOKENS = 512
SHORT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class PrefillAttention:
    """What a packed prefill batch of B sequences and T tokens attends to. Tokens after sum(query_lens) are padding."""

    # query_lens: each sequence's tokens in this batch, which are its last ones. kv_lens: its tokens up to and including
    # those. Both are empty in a CUDA graph, where only the device knows the lengths.
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    cu_query_lens: Tensor  # [B+1] int32: running sums of query_lens, from 0
    seq_lens: Tensor  # [B] int32: kv_lens on the device
    block_tables: Tensor  # [B, M] int32, M >= ceil(max(kv_lens) / block_size); any block after a sequence's end


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of a decode batch whose K and V are gathered and attended to together, the shorter ones padded."""

    rows: Tensor | None  # [R] int64; None: all rows of the batch
    blocks: Tensor  # [R * M] int32: M blocks of each row, those after its end included
    mask: Tensor  # [R, 1, 1, M * block_size] float32: 0 for a row's own tokens, -inf after its end
    after_end: Tensor  # [P] int64: which of the R * M * block_size gathered places are after their row's end


@dataclass(frozen=True, slots=True)
class DecodeAttention:
    """What a decode batch of B sequences attends to, and how, for all layers of a step."""

    block_tables: Tensor  # [B, M] int32
    seq_lens: Tensor  # [B] int32: tokens of the sequence, the current one included; 0 in a padded row
    plan: Tensor  # [5, items] int32: how the kernel's programs share the keys; empty in the reference
    groups: tuple[DecodeGroup, ...] = ()  # of the reference


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PrefillAttention, scale: float
) -> Tensor:
    """Causal attention of packed chunks to themselves and to everything before them in their sequences.

    q [T, Hq, D]; k, v [T, Hkv, D], which the caches hold already; key_cache, value_cache [N, block_size, Hkv, D],
    strided views, of q's dtype or E4M3. Hq is a multiple of Hkv. `scale` multiplies the scores. Returns [T, Hq, D].
    This reference takes no padding.
    """
    block_size = key_cache.shape[1]
    outputs = []
    start = 0
    for row, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        queries = q[start : start + query_len].transpose(0, 1)
        if query_len == kv_len:
            keys, values = k[start : start + query_len], v[start : start + query_len]
            mask = None
        else:
            blocks = batch.block_tables[row, : -(-kv_len // block_size)]
            keys, values = (
                widened(cache.index_select(0, blocks).flatten(0, 1)[:kv_len], q.dtype)
                for cache in (key_cache, value_cache)
            )
            mask = torch.ones(query_len, kv_len, dtype=torch.bool, device=q.device).tril_(kv_len - query_len)
        attended = F.scaled_dot_product_attention(
            queries.unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(attended.squeeze(0).transpose(0, 1))
        start += query_len
    return torch.cat(outputs)


def plan_decode(block_tables: Tensor, seq_lens: Tensor, key_cache: Tensor) -> DecodeAttention:
    """What all layers of a step attend to. `key_cache` [N, block_size, Hkv, D]: that of any layer.

    Sequences of similar length form a group, which is small enough for the K and V that are gathered to stay in the
    CPU's cache. For 32 lengths from 1 to 1,500 that is 2.7 times as fast as one padded batch.
    """
    block_size = key_cache.shape[1]
    lengths = seq_lens.clamp(min=1)
    groups = list(_groups([-(-length // block_size) for length in lengths.tolist()], block_size))
    made = []
    for rows, blocks in groups:
        index = None if len(groups) == 1 else torch.tensor(rows, device=seq_lens.device)
        tables, ends = (block_tables, lengths) if index is None else (block_tables[index], lengths[index])
        after_end = torch.arange(blocks * block_size, device=seq_lens.device) >= ends.unsqueeze(1)
        mask = torch.zeros(after_end.shape, dtype=torch.float32, device=seq_lens.device)
        mask.masked_fill_(after_end, -torch.inf)
        places = after_end.flatten().nonzero().squeeze(1)
        made.append(DecodeGroup(index, tables[:, :blocks].flatten(), mask[:, None, None, :], places))
    return DecodeAttention(block_tables, seq_lens, seq_lens.new_empty(0), tuple(made))


def decode_attention(
    qkv: Tensor, rotation: Rotation, key_cache: Tensor, value_cache: Tensor, batch: DecodeAttention, scale: float
) -> Tensor:
    """`rope_write_kv` of one token of each sequence, then its attention to all tokens of its sequence and itself.

    qkv [B, (Hq + 2 Hkv) * D], contiguous, overwritten with undefined contents; key_cache, value_cache [N, block_size,
    Hkv, D], strided views, of qkv's dtype or E4M3; batch comes from `plan_decode`. Its seq_lens are the rotation's
    positions + 1. A padded row has seq_len 0 and slot -1; its output is finite but undefined. Returns [B, Hq, D].

    The query heads that share a KV head become queries of that head, so that K and V need not be repeated (GQA: Ainslie
    et al., 2023).
    """
    q, _, _ = rope_write_kv(qkv, rotation, key_cache, value_cache)
    if len(batch.groups) == 1:
        return _decode_group(q, key_cache, value_cache, batch.groups[0], scale)
    attended = torch.empty_like(q)
    for group in batch.groups:
        attended[group.rows] = _decode_group(q[group.rows], key_cache, value_cache, group, scale)
    return attended


def _groups(blocks: list[int], block_size: int) -> Iterator[tuple[list[int], int]]:
    """Groups of rows to gather together, each with the blocks of its longest row. At most a quarter of a row is
    padding, and a group has at most _GATHERED_TOKENS, or is a single row."""
    order = sorted(range(len(blocks)), key=blocks.__getitem__, reverse=True)
    start = 0
    for end in range(1, len(order) + 1):
        widest = blocks[order[start]]
        if (
            end == len(order)
            or 4 * blocks[order[end]] < 3 * widest
            or (end + 1 - start) * widest * block_size > _GATHERED_TOKENS
        ):
            yield order[start:end], widest
            start = end


def _decode_group(q: Tensor, key_cache: Tensor, value_cache: Tensor, group: DecodeGroup, scale: float) -> Tensor:
    batch, num_heads, head_dim = q.shape
    num_kv_heads, tokens = key_cache.shape[2], group.mask.shape[-1]
    # What lies after a row's end is another sequence's. If that has overflowed, it is infinite or NaN, and stays NaN
    # with the mask's -inf added, or times a weight of 0.
    keys, values = (
        widened(cache.index_select(0, group.blocks).flatten(0, 1), q.dtype).index_fill_(0, group.after_end, 0.0)
        for cache in (key_cache, value_cache)
    )
    attended = F.scaled_dot_product_attention(
        q.view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim),
        keys.view(batch, tokens, num_kv_heads, head_dim).transpose(1, 2),
        values.view(batch, tokens, num_kv_heads, head_dim).transpose(1, 2),
        attn_mask=group.mask.to(q.dtype),
        scale=scale,
    )
    return attended.reshape(batch, num_heads, head_dim)
