# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Attention over a paged KV cache on CUDA; `kernels.attention` holds the references.

Softmax is computed in one pass over the keys (Milakov and Gimelshein, "Online normalizer calculation for softmax",
2018; Dao et al., "FlashAttention", 2022), in base 2. Decode splits a sequence's keys over several programs when there
are few sequences (Dao et al., "Flash-Decoding", 2023) and the last of them to finish merges the parts, so that it stays
one launch: a graph of decode steps at batch 1 is mostly launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import PrefillAttention
from kernels.triton_launch import MAX_ARRIVALS, arrivals, dependent, multiprocessors, wait_for_previous

_LOG2_E = 1.4426950408889634
_MAX_SPLITS = 64
_PROGRAMS_PER_SM = 2  # decode programs wanted for each SM; more would be more parts to merge
_MIN_SPAN = 64  # keys below which another split costs more than it hides
_MERGED = 16  # splits whose parts are merged at a time


@triton.jit
def _decode_kernel(
    q,
    key_cache,
    value_cache,
    block_tables,
    seq_lens,
    out,
    parts,
    part_scales,
    arrived,
    scale,
    q_stride_sequence,
    q_stride_head,
    cache_stride_block,
    cache_stride_token,
    cache_stride_head,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    MERGED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The GROUP query heads of one KV head (rows of a matrix product, padded to ROWS) over one split of the keys."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    whole = (row < GROUP)[:, None] & (lane < HEAD_DIM)[None, :]
    out_at = out + (sequence * KV_HEADS * GROUP + kv_head * GROUP + row)[:, None] * HEAD_DIM + lane[None, :]

    length = tl.load(seq_lens + sequence)
    span = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE, MIN_SPAN)
    start = split * span
    end = tl.minimum(start + span, length)
    table = block_tables + sequence * table_stride
    token = start + tl.arange(0, TILE)
    block = tl.load(table + token // BLOCK_SIZE, mask=token < end, other=0)
    wait_for_previous(DEPENDENT)
    if start >= end:
        if split == 0:
            tl.store(out_at, tl.zeros((ROWS, LANES), out.dtype.element_ty), mask=whole)
        return

    query_at = q + sequence * q_stride_sequence + (kv_head * GROUP + row)[:, None] * q_stride_head + lane[None, :]
    query = tl.load(query_at, mask=whole, other=0.0)
    keys = key_cache + kv_head * cache_stride_head
    values = value_cache + kv_head * cache_stride_head
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    # summed over the tile only at the end: one reduction between warps less in every step
    weight_sum = tl.zeros((ROWS, TILE), tl.float32)
    total = tl.zeros((ROWS, LANES), tl.float32)
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        token = first + tl.arange(0, TILE)
        inside = token < end
        at = (block.to(tl.int64) * cache_stride_block + token % BLOCK_SIZE * cache_stride_token)[:, None] + lane[
            None, :
        ]
        whole_rows: tl.constexpr = HEAD_DIM == LANES
        readable = inside[:, None] if whole_rows else inside[:, None] & (lane < HEAD_DIM)[None, :]
        key = tl.load(keys + at, mask=readable, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, axis=1))
        shrink = tl.exp2(largest - new_largest)
        weight = tl.exp2(score - new_largest[:, None])
        weight_sum = weight_sum * shrink[:, None] + weight
        value = tl.load(values + at, mask=readable, other=0.0)
        total = tl.dot(weight.to(value.dtype), value, total * shrink[:, None], input_precision="ieee")
        largest = new_largest
        # for the next step: its keys' addresses are then known when their loads are issued
        block = tl.load(table + (token + TILE) // BLOCK_SIZE, mask=token + TILE < end, other=0)
    normaliser = tl.sum(weight_sum, axis=1)
    total = total / normaliser[:, None]

    live = tl.cdiv(length, span)
    if live == 1:
        tl.store(out_at, total.to(out.dtype.element_ty), mask=whole)
    else:
        pair = sequence * KV_HEADS + kv_head
        part_rows = (pair * SPLITS + split) * GROUP + row
        tl.store(parts + part_rows[:, None] * HEAD_DIM + lane[None, :], total, mask=whole)
        tl.store(part_scales + part_rows, largest + tl.log2(normaliser), mask=row < GROUP)
        # all threads' parts are written before the release by the thread that counts; the last one acquires them all
        tl.debug_barrier()
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == live - 1:
            tl.store(arrived + pair, 0)
            every = tl.arange(0, SPLITS)
            for member in tl.static_range(GROUP):
                scales_at = part_scales + pair * (SPLITS * GROUP) + member
                parts_at = parts + (pair * (SPLITS * GROUP) + member) * HEAD_DIM + lane[None, :]
                # .cg: from L2, where the other programs' writes are
                scales = tl.load(
                    scales_at + every * GROUP, mask=every < live, other=float("-inf"), cache_modifier=".cg"
                )
                top = tl.max(scales)
                merged = tl.zeros((LANES,), tl.float32)
                for first in tl.range(0, live, MERGED):
                    other = first + tl.arange(0, MERGED)
                    mask = (other < live)[:, None] & (lane < HEAD_DIM)[None, :]
                    part = tl.load(
                        parts_at + other[:, None] * (GROUP * HEAD_DIM), mask=mask, other=0.0, cache_modifier=".cg"
                    )
                    part_scale = tl.load(
                        scales_at + other * GROUP, mask=other < live, other=float("-inf"), cache_modifier=".cg"
                    )
                    merged += tl.sum(part * tl.exp2(part_scale - top)[:, None], axis=0)
                merged = merged / tl.sum(tl.exp2(scales - top))
                head = sequence * KV_HEADS * GROUP + kv_head * GROUP + member
                tl.store(out + head * HEAD_DIM + lane, merged.to(out.dtype.element_ty), mask=lane < HEAD_DIM)


def _splits(pairs: int, max_tokens: int, device: torch.device) -> int:
    """Programs for each (sequence, KV head) pair, a power of two, of which short sequences use only a part."""
    wanted = triton.cdiv(_PROGRAMS_PER_SM * multiprocessors(device), pairs)
    useful = triton.cdiv(max_tokens, _MIN_SPAN)
    if pairs > MAX_ARRIVALS:
        return 1
    return int(triton.next_power_of_2(max(1, min(wanted, useful, _MAX_SPLITS))))


def _decode_tile(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Keys a step, warps, and pipeline stages of the decode kernel."""
    if dtype == torch.float32:
        return (32, 4, 2) if head_dim <= 128 else (16, 4, 2)
    return (32, 2, 3) if head_dim <= 128 else (32, 4, 3)


def decode_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, scale: float
) -> Tensor:
    """`kernels.attention.decode_attention` for CUDA tensors, any block size; one launch, whose grid depends on shapes
    alone, so that a graph captured once serves all lengths. Padded rows (seq_len 0) become zeros. The two caches have
    equal strides. Calls on one device must not overlap in time."""
    batch, num_heads, head_dim = q.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    group = num_heads // num_kv_heads
    tile, warps, stages = _decode_tile(head_dim, q.dtype)
    pairs = batch * num_kv_heads
    splits = _splits(pairs, block_tables.shape[1] * block_size, q.device)
    out = torch.empty((batch, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if splits > 1:
        parts = torch.empty((pairs, splits, group, head_dim), dtype=torch.float32, device=q.device)
        part_scales = torch.empty((pairs, splits, group), dtype=torch.float32, device=q.device)
    else:
        parts = part_scales = out  # not touched
    _decode_kernel[(num_kv_heads, splits, batch)](
        q,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        out,
        parts,
        part_scales,
        arrivals(q.device),
        scale * _LOG2_E,
        q.stride(0),
        q.stride(1),
        *key_cache.stride()[:3],
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        LANES=triton.next_power_of_2(head_dim),
        TILE=tile,
        SPLITS=splits,
        MIN_SPAN=max(tile, _MIN_SPAN),
        STAGES=stages,
        MERGED=min(splits, _MERGED),
        num_warps=warps,
        **dependent(q.device),
    )
    return out


@triton.jit
def _attend(
    total,
    largest,
    weight_sum,
    query,
    reach,
    keys,
    values,
    table,
    first_key,
    last_key,
    end,
    stride_block,
    stride_token,
    scale,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    PAGED: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One more run of keys, of `end` in all, for a tile of queries, of which each sees those below its `reach`."""
    lane = tl.arange(0, LANES)
    for first in tl.range(first_key, last_key, TILE, num_stages=STAGES):
        token = first + tl.arange(0, TILE)
        inside = token < end
        if PAGED:
            if MASKED:
                block = tl.load(table + token // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            else:
                block = tl.load(table + token // BLOCK_SIZE).to(tl.int64)
            place = block * stride_block + token % BLOCK_SIZE * stride_token
        else:
            place = token.to(tl.int64) * stride_token
        at = place[:, None] + lane[None, :]
        whole_rows: tl.constexpr = HEAD_DIM == LANES
        readable = inside[:, None] if whole_rows else inside[:, None] & (lane < HEAD_DIM)[None, :]
        if MASKED or not whole_rows:
            key = tl.load(keys + at, mask=readable, other=0.0)
            value = tl.load(values + at, mask=readable, other=0.0)
        else:
            key = tl.load(keys + at)
            value = tl.load(values + at)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if MASKED:
            score = tl.where(token[None, :] < reach[:, None], score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, axis=1))
        shrink = tl.exp2(largest - new_largest)
        weight = tl.exp2(score - new_largest[:, None])
        weight_sum = weight_sum * shrink + tl.sum(weight, axis=1)
        total = tl.dot(weight.to(value.dtype), value, total * shrink[:, None], input_precision="ieee")
        largest = new_largest
    return total, largest, weight_sum


@triton.jit
def _sequence_of_tile(cu_query_lens, tile, sequences, QUERIES: tl.constexpr):
    """The sequence that a tile of queries belongs to. Sequence s has the tiles from cu_query_lens[s] // QUERIES + s on:
    as many as it needs, or one more."""
    low = 0
    high = sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins_later = tl.load(cu_query_lens + middle) // QUERIES + middle > tile
        low = tl.where(begins_later, low, middle)
        high = tl.where(begins_later, middle - 1, high)
    return low


@triton.jit(do_not_specialize=["sequences"])
def _prefill_kernel(
    q,
    k,
    v,
    key_cache,
    value_cache,
    block_tables,
    cu_query_lens,
    cu_kv_lens,
    out,
    scale,
    sequences,
    q_stride_token,
    q_stride_head,
    kv_stride_token,
    kv_stride_head,
    cache_stride_block,
    cache_stride_token,
    cache_stride_head,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """QUERIES tokens of one head of one sequence: first their cached context, block by block, then their own chunk."""
    head = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = _sequence_of_tile(cu_query_lens, tile, sequences, QUERIES)
    query_start = tl.load(cu_query_lens + sequence)
    query_end = tl.load(cu_query_lens + sequence + 1)
    query_len = query_end - query_start
    context_len = tl.load(cu_kv_lens + sequence + 1) - tl.load(cu_kv_lens + sequence) - query_len
    # the tiles that see the most keys start first
    first_query = (query_end // QUERIES + sequence - tile) * QUERIES
    wait_for_previous(DEPENDENT)
    if (first_query < 0) | (first_query >= query_len):
        return  # of the tiles' count, which shapes decide, not all are needed

    row = first_query + tl.arange(0, QUERIES)
    lane = tl.arange(0, LANES)
    exists = (row < query_len)[:, None] & (lane < HEAD_DIM)[None, :]
    at = (query_start + row).to(tl.int64)[:, None]
    query = tl.load(q + at * q_stride_token + head * q_stride_head + lane[None, :], mask=exists, other=0.0)
    table = block_tables + sequence.to(tl.int64) * table_stride
    cached_keys = key_cache + head // GROUP * cache_stride_head
    cached_values = value_cache + head // GROUP * cache_stride_head
    own = query_start.to(tl.int64) * kv_stride_token + head // GROUP * kv_stride_head
    whole_context = context_len // TILE * TILE
    whole_context_reach = tl.full((QUERIES,), 0, tl.int32) + context_len
    seen_by_all = (first_query + 1) // TILE * TILE
    seen_by_any = tl.minimum(first_query + QUERIES, query_len)

    total = tl.zeros((QUERIES, LANES), tl.float32)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((QUERIES,), tl.float32)
    total, largest, weight_sum = _attend(
        total, largest, weight_sum, query, whole_context_reach, cached_keys, cached_values, table,
        0, whole_context, context_len, cache_stride_block, cache_stride_token, scale,
        BLOCK_SIZE, HEAD_DIM, LANES, TILE, True, False, STAGES,
    )  # fmt: skip
    total, largest, weight_sum = _attend(
        total, largest, weight_sum, query, whole_context_reach, cached_keys, cached_values, table,
        whole_context, context_len, context_len, cache_stride_block, cache_stride_token, scale,
        BLOCK_SIZE, HEAD_DIM, LANES, TILE, True, True, 1,
    )  # fmt: skip
    total, largest, weight_sum = _attend(
        total, largest, weight_sum, query, row + 1, k + own, v + own, table,
        0, seen_by_all, query_len, 0, kv_stride_token, scale,
        BLOCK_SIZE, HEAD_DIM, LANES, TILE, False, False, STAGES,
    )  # fmt: skip
    total, largest, weight_sum = _attend(
        total, largest, weight_sum, query, row + 1, k + own, v + own, table,
        seen_by_all, seen_by_any, query_len, 0, kv_stride_token, scale,
        BLOCK_SIZE, HEAD_DIM, LANES, TILE, False, True, STAGES,
    )  # fmt: skip
    out_at = out + (at * HEADS + head) * HEAD_DIM + lane[None, :]
    tl.store(out_at, (total / weight_sum[:, None]).to(out.dtype.element_ty), mask=exists)


def _prefill_tile(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Queries of a program, keys a step, warps, and pipeline stages of the prefill kernel."""
    if dtype == torch.float32:
        return (32, 32, 4, 2) if head_dim <= 128 else (16, 16, 4, 2)
    if head_dim <= 64:
        return 128, 64, 4, 3
    return (128, 64, 8, 3) if head_dim <= 128 else (64, 32, 4, 2)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PrefillAttention, scale: float
) -> Tensor:
    """`kernels.attention.prefill_attention` for CUDA tensors, any block size; one launch, whose grid depends on shapes
    alone, so that a graph captured once serves all lengths that fit. Only context is read from the cache, a chunk's own
    keys where they lie packed. k and v have equal strides, and so have the two caches."""
    tokens, num_heads, head_dim = q.shape
    sequences = batch.cu_query_lens.shape[0] - 1
    queries, tile, warps, stages = _prefill_tile(head_dim, q.dtype)
    out = torch.empty((tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    _prefill_kernel[(num_heads, tokens // queries + sequences)](
        q,
        k,
        v,
        key_cache,
        value_cache,
        batch.block_tables,
        batch.cu_query_lens,
        batch.cu_kv_lens,
        out,
        scale * _LOG2_E,
        sequences,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        *key_cache.stride()[:3],
        batch.block_tables.stride(0),
        BLOCK_SIZE=key_cache.shape[1],
        HEADS=num_heads,
        GROUP=num_heads // key_cache.shape[2],
        HEAD_DIM=head_dim,
        LANES=triton.next_power_of_2(head_dim),
        QUERIES=queries,
        TILE=tile,
        STAGES=stages,
        num_warps=warps,
        **dependent(q.device),
    )
    return out
