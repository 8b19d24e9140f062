"""Attention of one new token a sequence over a paged KV cache on CUDA; `kernels.attention` holds the reference.

Softmax is computed in one pass over the keys (Milakov and Gimelshein, "Online normalizer calculation for softmax",
2018), in base 2. A sequence's keys are split over several programs when there are few sequences (Dao et al.,
"Flash-Decoding", 2023), and the last of them to finish merges the parts. The same launch rotates q and k and writes the
new token's K and V, for a graph of decode steps at batch 1 is mostly launches.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rope import Rotation
from kernels.triton_launch import (
    MAX_ARRIVALS,
    arrivals,
    dependent,
    multiprocessors,
    prefetch_lines_to_l2,
    wait_for_previous,
)

_MAX_SPLITS = 64
_PROGRAMS_PER_SM = 2  # decode programs wanted for each SM; more would be more parts to merge
_MIN_SPAN = 64  # keys below which another split costs more than it hides
_LONG_SPAN = 512  # the same where splits only even out the programs' work
_MERGED_ELEMENTS = 4096  # of the parts that are merged at a time
_AHEAD = 64  # keys that a program asks for before it may read what the kernel ahead of it writes
_LINE_BYTES = 128  # of the L2 cache


@triton.jit
def _rotated(value, other, inverse, norm, other_norm, cos, sin, NORM: tl.constexpr):
    """A head's elements after norm and rotation: `other` are those that they are paired with, and `sin` has the sign of
    its term. Rounded where the reference rounds: after the normalisation, after the weight, after the rotation."""
    dtype = value.dtype
    a, b = value.to(tl.float32), other.to(tl.float32)
    if NORM:
        a = ((a * inverse).to(dtype).to(tl.float32) * norm).to(dtype).to(tl.float32)
        b = ((b * inverse).to(dtype).to(tl.float32) * other_norm).to(dtype).to(tl.float32)
    return (a * cos + b * sin).to(dtype)


@triton.jit
def _inverse_norm(value, eps, HEAD_DIM: tl.constexpr):
    wide = value.to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, axis=1) / HEAD_DIM + eps)[:, None]


@triton.jit
def _decode_kernel(
    qkv,
    positions,
    cos_sin,
    slots,
    q_norm,
    k_norm,
    eps,
    key_cache,
    value_cache,
    block_tables,
    seq_lens,
    out,
    parts,
    part_scales,
    arrived,
    scale,
    cache_stride_block,
    cache_stride_token,
    cache_stride_head,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    LINES: tl.constexpr,
    NORM: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPAN: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    MERGED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The GROUP query heads of one KV head (rows of a matrix product, padded to ROWS) over one split of the cached
    keys. The last split has the new token, too, whose key and value it makes and writes."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    in_head = lane < HEAD_DIM
    whole = (row < GROUP)[:, None] & in_head[None, :]
    out_at = out + (sequence * KV_HEADS * GROUP + kv_head * GROUP + row)[:, None] * HEAD_DIM + lane[None, :]

    length = tl.load(seq_lens + sequence)
    cached = length - 1
    span = tl.maximum(tl.cdiv(tl.cdiv(cached, SPLITS), TILE) * TILE, MIN_SPAN)
    live = tl.maximum(tl.cdiv(cached, span), 1)
    start = split * span
    end = tl.minimum(start + span, cached)
    table = block_tables + sequence * table_stride
    token = start + tl.arange(0, TILE)
    block = tl.load(table + token // BLOCK_SIZE, mask=token < end, other=0)
    keys = key_cache + kv_head * cache_stride_head
    values = value_cache + kv_head * cache_stride_head

    half: tl.constexpr = HEAD_DIM // 2
    angles = cos_sin + tl.load(positions + sequence).to(tl.int64) * HEAD_DIM
    pair = (lane + half) % HEAD_DIM
    cos = tl.load(angles + lane % half, mask=in_head, other=0.0)[None, :]
    sin = tl.load(angles + half + lane % half, mask=in_head, other=0.0)[None, :]
    sin = tl.where((lane < half)[None, :], -sin, sin)
    q_weight, q_pair_weight, k_weight, k_pair_weight = 1.0, 1.0, 1.0, 1.0
    if NORM:
        q_weight = tl.load(q_norm + lane, mask=in_head, other=0.0).to(tl.float32)[None, :]
        q_pair_weight = tl.load(q_norm + pair, mask=in_head, other=0.0).to(tl.float32)[None, :]
        k_weight = tl.load(k_norm + lane, mask=in_head, other=0.0).to(tl.float32)[None, :]
        k_pair_weight = tl.load(k_norm + pair, mask=in_head, other=0.0).to(tl.float32)[None, :]
    if DEPENDENT:
        ahead = start + tl.arange(0, AHEAD)
        ahead_block = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < end, other=0).to(tl.int64)
        line = tl.arange(0, LINES) * (HEAD_DIM // LINES)
        ahead_at = (ahead_block * cache_stride_block + ahead % BLOCK_SIZE * cache_stride_token)[:, None] + line[None, :]
        prefetch_lines_to_l2(keys + ahead_at)
        prefetch_lines_to_l2(values + ahead_at)
    wait_for_previous(DEPENDENT)
    if (split >= live) | (length <= 0):
        if split == 0:
            tl.store(out_at, tl.zeros((ROWS, LANES), out.dtype.element_ty), mask=whole)
        return

    token_qkv = qkv + sequence * ((GROUP + 2) * KV_HEADS * HEAD_DIM)
    query_at = token_qkv + (kv_head * GROUP + row)[:, None] * HEAD_DIM
    key_at = token_qkv + (GROUP * KV_HEADS + kv_head) * HEAD_DIM
    makes_key = in_head & (split == live - 1)
    query = tl.load(query_at + lane[None, :], mask=whole, other=0.0)
    query_pair = tl.load(query_at + pair[None, :], mask=whole, other=0.0)
    new_key = tl.load(key_at + lane, mask=makes_key, other=0.0)[None, :]
    new_key_pair = tl.load(key_at + pair, mask=makes_key, other=0.0)[None, :]
    new_value = tl.load(key_at + KV_HEADS * HEAD_DIM + lane, mask=makes_key, other=0.0)[None, :]
    query_inverse, key_inverse = 1.0, 1.0
    if NORM:
        query_inverse = _inverse_norm(query, eps, HEAD_DIM)
        key_inverse = _inverse_norm(new_key, eps, HEAD_DIM)
    query = _rotated(query, query_pair, query_inverse, q_weight, q_pair_weight, cos, sin, NORM)
    new_key = _rotated(new_key, new_key_pair, key_inverse, k_weight, k_pair_weight, cos, sin, NORM)

    # the new token first, where this split has it
    new_score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1) * scale
    largest = tl.where(split == live - 1, new_score, float("-inf"))
    # summed over the tile only at the end: one reduction between warps less in every step
    counts = (tl.arange(0, TILE) == 0) & (split == live - 1)
    weight_sum = tl.zeros((ROWS, TILE), tl.float32) + tl.where(counts, 1.0, 0.0)[None, :]
    total = tl.zeros((ROWS, LANES), tl.float32) + new_value.to(tl.float32)
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        token = first + tl.arange(0, TILE)
        inside = token < end
        at = (block.to(tl.int64) * cache_stride_block + token % BLOCK_SIZE * cache_stride_token)[:, None] + lane[
            None, :
        ]
        whole_rows: tl.constexpr = HEAD_DIM == LANES
        readable = inside[:, None] if whole_rows else inside[:, None] & in_head[None, :]
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

    slot = tl.load(slots + sequence).to(tl.int64)
    place = slot // BLOCK_SIZE * cache_stride_block + slot % BLOCK_SIZE * cache_stride_token
    tl.store(keys + place + lane[None, :], new_key, mask=makes_key[None, :] & (slot >= 0))
    tl.store(values + place + lane[None, :], new_value, mask=makes_key[None, :] & (slot >= 0))

    if live == 1:
        tl.store(out_at, total.to(out.dtype.element_ty), mask=whole)
    else:
        head_pair = sequence * KV_HEADS + kv_head
        part_rows = (head_pair * SPLITS + split) * GROUP + row
        tl.store(parts + part_rows[:, None] * HEAD_DIM + lane[None, :], total, mask=whole)
        tl.store(part_scales + part_rows, largest + tl.log2(normaliser), mask=row < GROUP)
        # all threads' parts are written before the release by the thread that counts; the last one acquires them all
        tl.debug_barrier()
        if tl.atomic_add(arrived + head_pair, 1, sem="acq_rel") == live - 1:
            tl.store(arrived + head_pair, 0)
            member = tl.arange(0, GROUP_ROWS)
            exists = (member < GROUP)[:, None] & in_head[None, :]
            top = tl.full((GROUP_ROWS,), float("-inf"), tl.float32)
            weights = tl.zeros((GROUP_ROWS,), tl.float32)
            merged = tl.zeros((GROUP_ROWS, LANES), tl.float32)
            for first in tl.range(0, live, MERGED):
                other = first + tl.arange(0, MERGED)
                rows = (head_pair * SPLITS + other)[:, None] * GROUP + member[None, :]
                there = (other < live)[:, None] & (member < GROUP)[None, :]
                # .cg: from L2, where the other programs' writes are
                part = tl.load(
                    parts + rows[:, :, None] * HEAD_DIM + lane[None, None, :],
                    mask=there[:, :, None] & in_head[None, None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                part_scale = tl.load(part_scales + rows, mask=there, other=-1e30, cache_modifier=".cg")
                new_top = tl.maximum(top, tl.max(part_scale, axis=0))
                weight = tl.exp2(part_scale - new_top[None, :])
                shrink = tl.exp2(top - new_top)
                merged = merged * shrink[:, None] + tl.sum(part * weight[:, :, None], axis=0)
                weights = weights * shrink + tl.sum(weight, axis=0)
                top = new_top
            merged = merged / weights[:, None]
            head = sequence * KV_HEADS * GROUP + kv_head * GROUP + member
            merged_at = out + head[:, None] * HEAD_DIM + lane[None, :]
            tl.store(merged_at, merged.to(out.dtype.element_ty), mask=exists)


def _splits(pairs: int, max_tokens: int, device: torch.device) -> tuple[int, int]:
    """Programs for each (sequence, KV head) pair, a power of two, of which short sequences use only a part, and the
    keys of the shortest span that is split off. With programs enough, only long sequences are split in two: one that
    comes last would otherwise keep a few multiprocessors busy and the others waiting."""
    if pairs > MAX_ARRIVALS:
        return 1, _MIN_SPAN
    wanted = triton.cdiv(_PROGRAMS_PER_SM * multiprocessors(device), pairs)
    span = _MIN_SPAN if wanted > 1 else _LONG_SPAN
    useful = triton.cdiv(max_tokens, span)
    return int(triton.next_power_of_2(max(1, min(max(wanted, 2), useful, _MAX_SPLITS)))), span


def _tile(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Keys a step, warps, and pipeline stages of the decode kernel."""
    if dtype == torch.float32:
        return (32, 4, 2) if head_dim <= 128 else (16, 4, 2)
    return (64, 4, 2) if head_dim <= 128 else (32, 4, 3)


def decode_attention(
    qkv: Tensor,
    rotation: Rotation,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    """`kernels.attention.decode_attention` for CUDA tensors, any block size; one launch, whose grid depends on shapes
    alone, so that a graph captured once serves all lengths. Padded rows (seq_len 0) become zeros. The two caches have
    equal strides. Calls on one device must not overlap in time."""
    batch = qkv.shape[0]
    block_size, num_kv_heads, head_dim = key_cache.shape[1:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    group = num_heads // num_kv_heads
    group_rows = triton.next_power_of_2(group)
    tile, warps, stages = _tile(head_dim, qkv.dtype)
    lanes = triton.next_power_of_2(head_dim)
    pairs = batch * num_kv_heads
    splits, min_span = _splits(pairs, block_tables.shape[1] * block_size, qkv.device)
    out = torch.empty((batch, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if splits > 1:
        parts = torch.empty((pairs, splits, group, head_dim), dtype=torch.float32, device=qkv.device)
        part_scales = torch.empty((pairs, splits, group), dtype=torch.float32, device=qkv.device)
    else:
        parts = part_scales = out  # not touched
    _decode_kernel[(num_kv_heads, splits, batch)](
        qkv,
        rotation.positions,
        rotation.cos_sin,
        rotation.slots,
        qkv if rotation.q_norm is None else rotation.q_norm,
        qkv if rotation.k_norm is None else rotation.k_norm,
        rotation.eps,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        out,
        parts,
        part_scales,
        arrivals(qkv.device),
        scale * math.log2(math.e),
        *key_cache.stride()[:3],
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        ROWS=max(16, group_rows),
        GROUP_ROWS=group_rows,
        HEAD_DIM=head_dim,
        LANES=lanes,
        LINES=triton.next_power_of_2(triton.cdiv(head_dim * key_cache.element_size(), _LINE_BYTES)),
        NORM=rotation.q_norm is not None,
        TILE=tile,
        SPLITS=splits,
        MIN_SPAN=max(tile, min_span),
        AHEAD=_AHEAD,
        STAGES=stages,
        MERGED=max(1, min(splits, _MERGED_ELEMENTS // (group_rows * lanes))),
        num_warps=warps,
        **dependent(qkv.device),
    )
    return out
