# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Attention of packed prompts to their cached context and to their own tokens on CUDA; `kernels.attention` holds the
reference.

Softmax is computed in one pass over the keys (Milakov and Gimelshein, "Online normalizer calculation for softmax",
2018; Dao et al., "FlashAttention", 2022), in base 2. If there are too few queries for all SMs, a long context is cut
into parts, and the last program to finish merges them (Dao et al., "Flash-Decoding", 2023).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import SHORT_TOKENS, PrefillAttention
from kernels.cuda.gpu import multiprocessors
from kernels.cuda.triton_arrivals import MAX_ARRIVALS, arrivals, is_last_to_arrive
from kernels.cuda.triton_fp8_kv import query_beside
from kernels.cuda.triton_launch import dependent, wait_for_previous

_PROGRAMS_PER_SM = 2  # that run at once
_MOST_PARTS = 16
_PART_KEYS = 256  # of the context that a part has at least


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
    """Attends a tile of queries to the keys from first_key to last_key, of `end` in all. A query sees the keys below
    its `reach`."""
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
            key = tl.load(keys + at, mask=readable, other=0.0).to(query.dtype)
            value = tl.load(values + at, mask=readable, other=0.0).to(query.dtype)
        else:
            key = tl.load(keys + at).to(query.dtype)
            value = tl.load(values + at).to(query.dtype)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        if MASKED:
            score = tl.where(token[None, :] < reach[:, None], score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, axis=1))
        shrink = tl.exp2((largest - new_largest) * scale)
        weight = tl.exp2(score * scale - (new_largest * scale)[:, None])
        weight_sum = weight_sum * shrink + tl.sum(weight, axis=1)
        total = tl.dot(weight.to(value.dtype), value, total * shrink[:, None], input_precision="ieee")
        largest = new_largest
    return total, largest, weight_sum


@triton.jit
def _sequence_of_tile(cu_query_lens, tile, sequences, TOKENS: tl.constexpr):
    """The sequence that a tile of queries belongs to.

    The tiles of sequence s begin at cu_query_lens[s] // TOKENS + s, which gives it as many as it needs, or one more.
    All starts are loaded at once: a search, load after load, took longer than the attention of a short prompt.
    """
    before = 0
    for first in range(1, sequences, 128):
        sequence = first + tl.arange(0, 128)
        start = tl.load(cu_query_lens + sequence, mask=sequence < sequences, other=0, cache_modifier=".cg")
        before += tl.sum(((start // TOKENS + sequence <= tile) & (sequence < sequences)).to(tl.int32))
    return before


@triton.jit
def _merged(parts, part_scales, first_row, rows_of_a_part, count, exists, HEAD_DIM: tl.constexpr, LANES: tl.constexpr):
    """The results of a tile's queries over `count` parts of their keys, as those over all. first_row [ROWS, 1]: where
    those over the first part are. exists [ROWS]."""
    lane = tl.arange(0, LANES)[None, :]
    exists = exists[:, None]
    total = tl.zeros((first_row.shape[0], LANES), tl.float32)
    largest = tl.full(first_row.shape, float("-inf"), tl.float32)
    weight_sum = tl.zeros(first_row.shape, tl.float32)
    for part in tl.range(0, count):
        row = first_row + part * rows_of_a_part
        # .cg: the other programs' writes are in L2, not in this SM's L1
        there = exists & (lane < HEAD_DIM)
        result = tl.load(parts + row * HEAD_DIM + lane, mask=there, other=0.0, cache_modifier=".cg")
        scale = tl.load(part_scales + row, mask=exists, other=0.0, cache_modifier=".cg")
        new_largest = tl.maximum(largest, scale)
        shrink = tl.exp2(largest - new_largest)
        weight = tl.exp2(scale - new_largest)
        total = total * shrink + result * weight
        weight_sum = weight_sum * shrink + weight
        largest = new_largest
    return total / weight_sum


@triton.jit(do_not_specialize=["sequences", "tokens"])
def _prefill_kernel(
    q,
    k,
    v,
    key_cache,
    value_cache,
    block_tables,
    cu_query_lens,
    seq_lens,
    out,
    parts,
    part_scales,
    arrived,
    scale,
    sequences,
    tokens,
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
    PACK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    CUT: tl.constexpr,
    PART_KEYS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """ROWS queries of one sequence, of PACK heads that share their keys. They attend to their cached context first,
    block by block, then to their own chunk. If CUT, a long context is cut into up to as many parts as the grid has, and
    a program attends to one of these; that of the last part has the chunk as well."""
    TOKENS: tl.constexpr = ROWS // PACK
    first_head = tl.program_id(0) * PACK
    tile = tl.program_id(1)
    sequence = _sequence_of_tile(cu_query_lens, tile, sequences, TOKENS)
    query_start = tl.load(cu_query_lens + sequence, cache_modifier=".cg")
    query_end = tl.load(cu_query_lens + sequence + 1, cache_modifier=".cg")
    query_len = query_end - query_start
    context_len = tl.load(seq_lens + sequence, cache_modifier=".cg") - query_len
    # a sequence's tiles start with the last, which sees the most keys
    first_query = (query_end // TOKENS + sequence - tile) * TOKENS
    part = tl.program_id(2)
    cut = tl.maximum(tl.minimum(context_len // PART_KEYS, tl.num_programs(2)), 1) if CUT else 1
    span = tl.cdiv(tl.cdiv(context_len, cut), TILE) * TILE
    count = tl.maximum(tl.cdiv(context_len, tl.maximum(span, 1)), 1)
    first_key = part * span
    last_key = tl.minimum(first_key + span, context_len)
    is_last = part == count - 1
    wait_for_previous(DEPENDENT)
    if (first_query < 0) | (first_query >= query_len) | (part >= count):
        return  # the grid depends on shapes alone, so it may have more tiles and parts than the sequences need

    row = first_query + tl.arange(0, ROWS) // PACK
    head = (first_head + tl.arange(0, ROWS) % PACK)[:, None]
    lane = tl.arange(0, LANES)
    exists = (row < query_len)[:, None] & (lane < HEAD_DIM)[None, :]
    at = (query_start + row).to(tl.int64)[:, None]
    query = tl.load(q + at * q_stride_token + head * q_stride_head + lane[None, :], mask=exists, other=0.0)
    query_of_cached = query_beside(key_cache, query)
    table = block_tables + sequence.to(tl.int64) * table_stride
    kv_head = first_head // GROUP
    cached_keys = key_cache + kv_head * cache_stride_head
    cached_values = value_cache + kv_head * cache_stride_head
    own = query_start.to(tl.int64) * kv_stride_token + kv_head * kv_stride_head
    whole_tiles = last_key // TILE * TILE
    whole_context_reach = tl.full((ROWS,), 0, tl.int32) + context_len
    seen_by_all = tl.where(is_last, (first_query + 1) // TILE * TILE, 0)
    seen_by_any = tl.where(is_last, tl.minimum(first_query + TOKENS, query_len), 0)

    total = tl.zeros((ROWS, LANES), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((ROWS,), tl.float32)
    total, largest, weight_sum = _attend(
        total, largest, weight_sum, query_of_cached, whole_context_reach, cached_keys, cached_values, table,
        first_key, whole_tiles, context_len, cache_stride_block, cache_stride_token, scale,
        BLOCK_SIZE, HEAD_DIM, LANES, TILE, True, False, STAGES,
    )  # fmt: skip
    total, largest, weight_sum = _attend(
        total, largest, weight_sum, query_of_cached, whole_context_reach, cached_keys, cached_values, table,
        whole_tiles, last_key, context_len, cache_stride_block, cache_stride_token, scale,
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
    total = total / weight_sum[:, None]
    result_row = at * HEADS + head
    is_whole = True
    if CUT:
        is_whole = count == 1
        if not is_whole:
            part_row = result_row + part.to(tl.int64) * tokens * HEADS
            part_scale = largest * scale + tl.log2(weight_sum)
            tl.store(parts + part_row * HEAD_DIM + lane[None, :], total, mask=exists)
            tl.store(part_scales + part_row, part_scale[:, None], mask=(row < query_len)[:, None])
            is_whole = is_last_to_arrive(arrived + tile * tl.num_programs(0) + tl.program_id(0), count)
            if is_whole:
                total = _merged(parts, part_scales, result_row, tokens * HEADS, count, row < query_len, HEAD_DIM, LANES)
    tl.store(out + result_row * HEAD_DIM + lane[None, :], total.to(out.dtype.element_ty), mask=exists & is_whole)


def _tile(head_dim: int, dtype: torch.dtype, tokens: int) -> tuple[int, int, int, int]:
    """Rows per program, keys per step, warps, and pipeline stages of the prefill kernel."""
    if dtype == torch.float32:
        return (32, 32, 4, 2) if head_dim <= 128 else (16, 16, 4, 2)
    if head_dim > 128:
        return 64, 32, 4, 2
    return 64, 64, 4, 3 if tokens > 2048 else 2  # a third stage makes long prompts faster, and short ones slower


def _parts(groups: int, full_tiles: int, tiles: int, longest: int, device: torch.device) -> int:
    """Into how many parts the contexts of a batch may be cut. `longest`: tokens of the longest sequence."""
    if longest <= SHORT_TOKENS or groups * tiles > MAX_ARRIVALS:
        return 1
    return max(1, min(_MOST_PARTS, _PROGRAMS_PER_SM * multiprocessors(device) // (groups * full_tiles)))


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PrefillAttention, scale: float
) -> Tensor:
    """`kernels.attention.prefill_attention` for CUDA tensors, any block size.

    It is one launch, whose grid depends on shapes alone, so a graph captured once serves all lengths that fit it. Only
    the context is read from the cache; a chunk's own keys and values are read from k and v. Those two have equal
    strides, and so have the two caches. Calls on one device must not overlap in time, as they share
    `kernels.cuda.triton_arrivals.arrivals`.
    """
    tokens, num_heads, head_dim = q.shape
    sequences = batch.cu_query_lens.shape[0] - 1
    rows, tile, warps, stages = _tile(head_dim, q.dtype, tokens)
    group = num_heads // key_cache.shape[2]
    pack = math.gcd(group, rows)
    out = torch.empty((tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    groups, tiles = num_heads // pack, tokens * pack // rows + sequences
    count = _parts(groups, -(-tokens * pack // rows), tiles, batch.block_tables.shape[1] * key_cache.shape[1], q.device)
    parts = torch.empty((count if count > 1 else 0, tokens, num_heads, head_dim), dtype=torch.float32, device=q.device)
    _prefill_kernel[(groups, tiles, count)](
        q,
        k,
        v,
        key_cache,
        value_cache,
        batch.block_tables,
        batch.cu_query_lens,
        batch.seq_lens,
        out,
        parts,
        torch.empty(parts.shape[:3], dtype=torch.float32, device=q.device),
        arrivals(q.device),
        scale * math.log2(math.e),
        sequences,
        tokens,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        *key_cache.stride()[:3],
        batch.block_tables.stride(0),
        BLOCK_SIZE=key_cache.shape[1],
        HEADS=num_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        LANES=triton.next_power_of_2(head_dim),
        PACK=pack,
        ROWS=rows,
        TILE=tile,
        STAGES=stages,
        CUT=count > 1,
        PART_KEYS=_PART_KEYS,
        num_warps=warps,
        **dependent(q.device),
    )
    return out
