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
    kv_len,
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
    """One more run of keys for a tile of queries, of which each sees the keys below its `reach`."""
    lane = tl.arange(0, LANES)
    for first in tl.range(first_key, last_key, TILE, num_stages=STAGES):
        token = first + tl.arange(0, TILE)
        inside = token < kv_len
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
def _prefill_kernel(
    q,
    keys,
    values,
    block_tables,
    cu_query_lens,
    cu_kv_lens,
    out,
    scale,
    q_stride_token,
    q_stride_head,
    kv_stride_block,
    kv_stride_token,
    kv_stride_head,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    PAGED: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """QUERIES tokens of one head of one sequence."""
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    query_start = tl.load(cu_query_lens + sequence)
    query_len = tl.load(cu_query_lens + sequence + 1) - query_start
    kv_start = tl.load(cu_kv_lens + sequence)
    kv_len = tl.load(cu_kv_lens + sequence + 1) - kv_start
    # the tiles that see the most keys start first
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    wait_for_previous(DEPENDENT)
    if first_query >= query_len:
        return

    row = first_query + tl.arange(0, QUERIES)
    lane = tl.arange(0, LANES)
    exists = (row < query_len)[:, None] & (lane < HEAD_DIM)[None, :]
    at = (query_start + row).to(tl.int64)[:, None]
    query = tl.load(q + at * q_stride_token + head * q_stride_head + lane[None, :], mask=exists, other=0.0)
    reach = kv_len - query_len + row + 1
    seen_by_all = (kv_len - query_len + first_query + 1) // TILE * TILE
    seen_by_any = tl.minimum(kv_len - query_len + first_query + QUERIES, kv_len)
    table = block_tables + sequence.to(tl.int64) * table_stride
    keys += head // GROUP * kv_stride_head
    values += head // GROUP * kv_stride_head
    if not PAGED:
        keys += kv_start.to(tl.int64) * kv_stride_token
        values += kv_start.to(tl.int64) * kv_stride_token

    total = tl.zeros((QUERIES, LANES), tl.float32)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((QUERIES,), tl.float32)
    total, largest, weight_sum = _attend(
        total, largest, weight_sum, query, reach, keys, values, table, 0, seen_by_all, kv_len,
        kv_stride_block, kv_stride_token, scale,
        BLOCK_SIZE, HEAD_DIM, LANES, TILE, PAGED, False, STAGES,
    )  # fmt: skip
    total, largest, weight_sum = _attend(
        total, largest, weight_sum, query, reach, keys, values, table, seen_by_all, seen_by_any, kv_len,
        kv_stride_block, kv_stride_token, scale,
        BLOCK_SIZE, HEAD_DIM, LANES, TILE, PAGED, True, STAGES,
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
    """`kernels.attention.prefill_attention` for CUDA tensors, any block size. Without cached context k and v are read
    packed, otherwise all keys come from the cache. k and v have equal strides, and so have the two caches."""
    tokens, num_heads, head_dim = q.shape
    paged = batch.query_lens != batch.kv_lens
    keys, values = (key_cache, value_cache) if paged else (k, v)
    kv_strides = key_cache.stride()[:3] if paged else (0, *k.stride()[:2])
    queries, tile, warps, stages = _prefill_tile(head_dim, q.dtype)
    out = torch.empty((tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    _prefill_kernel[(triton.cdiv(max(batch.query_lens), queries), num_heads, len(batch.query_lens))](
        q,
        keys,
        values,
        batch.block_tables,
        batch.cu_query_lens,
        batch.cu_kv_lens,
        out,
        scale * _LOG2_E,
        q.stride(0),
        q.stride(1),
        *kv_strides,
        batch.block_tables.stride(0),
        BLOCK_SIZE=key_cache.shape[1],
        HEADS=num_heads,
        GROUP=num_heads // key_cache.shape[2],
        HEAD_DIM=head_dim,
        LANES=triton.next_power_of_2(head_dim),
        QUERIES=queries,
        TILE=tile,
        PAGED=paged,
        STAGES=stages,
        num_warps=warps,
        **dependent(q.device),
    )
    return out
