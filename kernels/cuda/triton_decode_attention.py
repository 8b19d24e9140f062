# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Attention of one new token per sequence over a paged KV cache on CUDA; `kernels.attention` holds the reference.

- Softmax is computed in one pass over the keys (Milakov and Gimelshein, "Online normalizer calculation for softmax",
  2018), in base 2.
- A plan, made once per step for all layers, cuts sequences that are longer than an equal share of the batch's keys into
  pieces. The longest pieces start first (Graham, "Bounds on multiprocessing timing anomalies", 1969), which keeps the
  tail of the launch short.
- The last program of a sequence to finish merges its pieces (Dao et al., "Flash-Decoding", 2023).
- The same launch rotates q and k and writes the new token's K and V: at batch 1, launches are most of a decode step.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import DecodeAttention
from kernels.cuda.gpu import multiprocessors
from kernels.cuda.triton_arrivals import MAX_ARRIVALS, arrivals, is_last_to_arrive
from kernels.cuda.triton_fp8_kv import query_beside, unpaired
from kernels.cuda.triton_launch import dependent, prefetch_lines_to_l2, wait_for_previous
from kernels.fp8 import E4M3
from kernels.rope import Rotation

_PROGRAMS_PER_SM = 3  # that run at once: each gets an equal share of the keys
_REGISTERS = 128  # of a thread, if there are more sequences than shares:
_MOST_PER_SM = 4  # then so many programs fit an SM
_COMPARED = 8192  # pairs of sequences that the plan's kernel compares at a time
_MERGED_ELEMENTS = 4096  # elements of the pieces' results that are merged at a time
_AHEAD = 64  # keys that a program prefetches before it waits for the previous kernel
_LINE_BYTES = 128  # of an L2 cache line
_LEAST_INNER = 16  # dimension of a matrix product


@triton.jit
def _rotated(value, other, inverse, norm, other_norm, cos, sin, NORM: tl.constexpr):
    """A head's elements after norm and rotation. `other`: the elements that they are paired with; `sin` includes the
    sign of its term. Rounds where the reference rounds: after the normalisation, the weight, and the rotation."""
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


@triton.jit(do_not_specialize=["rows", "items"])
def _plan_kernel(
    seq_lens,
    plan,
    sizes,
    rows,
    items,
    shares,
    at_once,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Cuts sequences that are longer than a share of all keys into pieces of about a share, at least two, and lists the
    pieces, the longest first.

    If sequences are about equally long, none holds up the others. Then one of less than two and a half shares is not
    worth cutting and merging, since two programs per SM read as fast as three. About equal means a coefficient of
    variation of up to 0.14; that of lengths uniform from 1,060 to 1,980 is 0.18.

    But equally long sequences also end together. If there are more than run at once and none is cut, those of the last
    wave would leave much of the GPU idle, so these are, into about as many pieces as run at once. Either way no more
    pieces are added than there are shares.
    """
    wait_for_previous(DEPENDENT)
    row = tl.arange(0, ROWS)
    exists = row < rows
    cached = tl.load(seq_lens + row, mask=exists, other=0) - 1
    keys = tl.maximum(cached, 1)
    total = tl.sum(tl.where(exists, keys, 0), 0)
    a_share = tl.cdiv(total, shares)
    is_sequence = exists & (cached >= 0)
    length = tl.where(is_sequence, keys, 0).to(tl.float32)
    mean = tl.sum(length, 0) / tl.maximum(tl.sum(is_sequence.to(tl.float32), 0), 1.0)
    deviation = tl.where(is_sequence, length - mean, 0.0)
    uneven = tl.sum(deviation * deviation, 0) > 0.02 * mean * tl.sum(length, 0)
    is_cut = keys > tl.where(uneven, a_share, 5 * a_share // 2)
    wanted = tl.where(is_cut, tl.maximum((2 * keys + a_share) // (2 * a_share), 2), 1)
    number = tl.cumsum(is_sequence.to(tl.int32), 0)
    sequences = tl.max(number, 0)
    last_wave = tl.where(sequences > at_once, sequences % at_once, 0)
    last_wave = tl.where(uneven, 0, last_wave) * (1 - tl.max(is_cut.to(tl.int32), 0))
    is_last = is_sequence & (number > sequences - last_wave)
    pieces_each = tl.minimum(at_once // tl.maximum(last_wave, 1), 1 + shares // tl.maximum(last_wave, 1))
    wanted = tl.where(is_last, tl.maximum(wanted, pieces_each), wanted)
    span = tl.cdiv(tl.cdiv(keys, wanted), TILE) * TILE
    pieces = tl.where(exists, tl.cdiv(keys, span), 0)
    count = tl.sum(pieces, 0)
    # Every row needs the spans and pieces of all others: through memory, instead of computing them again for each row.
    tl.store(sizes + row, span)
    tl.store(sizes + ROWS + row, pieces)
    tl.debug_barrier()
    before = tl.zeros((ROWS, OTHERS), tl.int32)
    for at in tl.range(0, ROWS, OTHERS):
        other = at + tl.arange(0, OTHERS)
        other_span = tl.load(sizes + other)[None, :]
        other_pieces = tl.load(sizes + ROWS + other)[None, :]
        is_before = (other_span > span[:, None]) | ((other_span == span[:, None]) & (other[None, :] < row[:, None]))
        before += tl.where(is_before, other_pieces, 0)
    place = tl.sum(before, axis=1)
    for piece in tl.range(0, tl.max(pieces, 0)):
        item = plan + place + piece
        there = piece < pieces
        tl.store(item, row, mask=there)
        tl.store(item + items, piece * span, mask=there)
        tl.store(item + 2 * items, tl.minimum((piece + 1) * span, cached), mask=there)
        tl.store(item + 3 * items, place, mask=there)
        tl.store(item + 4 * items, place + pieces, mask=there)
    for at in tl.range(count, items, ROWS):
        tl.store(plan + at + row, -1, mask=at + row < items)


@triton.jit
def _ask_for_first(
    keys,
    values,
    table,
    start,
    end,
    cache_stride_block,
    cache_stride_token,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LINES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Prefetches the first AHEAD keys and values, from `start` on, to L2."""
    token = start + tl.arange(0, AHEAD)
    block = tl.load(table + token // BLOCK_SIZE, mask=token < end, other=0, cache_modifier=".cg").to(tl.int64)
    line = tl.arange(0, LINES) * (HEAD_DIM // LINES)
    at = (block * cache_stride_block + token % BLOCK_SIZE * cache_stride_token)[:, None] + line[None, :]
    prefetch_lines_to_l2(keys + at)
    prefetch_lines_to_l2(values + at)


@triton.jit
def _weighted(score, inside, largest, weight_sum):
    """One step of the online softmax: the weights of one more tile of keys, the factor by which they shrink what was
    summed before, the largest score, and the sums of weights (one for each place in a tile)."""
    score = tl.where(inside[None, :], score, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(score, axis=1))
    shrink = tl.exp2(largest - new_largest)[:, None]
    weight = tl.exp2(score - new_largest[:, None])
    return weight, shrink, new_largest, weight_sum * shrink + weight


@triton.jit
def _merged(
    parts,
    part_scales,
    items_before,
    first_item,
    end_item,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Merges the results of one sequence and KV head, each over its own piece of the keys, into the result over all."""
    member = tl.arange(0, GROUP_ROWS)
    lane = tl.arange(0, LANES)
    top = tl.full((GROUP_ROWS,), float("-inf"), tl.float32)
    weights = tl.zeros((GROUP_ROWS,), tl.float32)
    merged = tl.zeros((GROUP_ROWS, LANES), tl.float32)
    for first in tl.range(first_item, end_item, MERGED):
        other = first + tl.arange(0, MERGED)
        rows = (items_before + other).to(tl.int64)[:, None] * GROUP + member[None, :]
        there = (other < end_item)[:, None] & (member < GROUP)[None, :]
        # .cg: the other programs' writes are in L2, not in this SM's L1
        part = tl.load(
            parts + rows[:, :, None] * HEAD_DIM + lane[None, None, :],
            mask=there[:, :, None] & (lane < HEAD_DIM)[None, None, :],
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
    return merged / weights[:, None]


@triton.jit(do_not_specialize=["items"])
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
    plan,
    out,
    parts,
    part_scales,
    arrived,
    scale,
    items,
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
    PAIRED: tl.constexpr,
    TILE: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    MERGED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One item of the plan, for one KV head: its GROUP query heads, as rows of a matrix product padded to ROWS, attend
    to the item's keys. A sequence's last item also has the new token: it computes and writes that token's key and
    value. PAIRED: the caches are 8-bit floats, and a head is read as its even and its odd elements (`unpaired`)."""
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    in_head = lane < HEAD_DIM
    whole = (row < GROUP)[:, None] & in_head[None, :]

    sequence = tl.load(plan + item, cache_modifier=".cg").to(tl.int64)
    start = tl.load(plan + items + item, cache_modifier=".cg")
    end = tl.load(plan + 2 * items + item, cache_modifier=".cg")
    first_item = tl.load(plan + 3 * items + item, cache_modifier=".cg")
    end_item = tl.load(plan + 4 * items + item, cache_modifier=".cg")
    if sequence < 0:
        wait_for_previous(DEPENDENT)
        return
    is_last = item == end_item - 1
    out_at = out + (sequence * KV_HEADS * GROUP + kv_head * GROUP + row)[:, None] * HEAD_DIM + lane[None, :]
    table = block_tables + sequence * table_stride
    token = start + tl.arange(0, TILE)
    block = tl.load(table + token // BLOCK_SIZE, mask=token < end, other=0, cache_modifier=".cg")
    keys = key_cache + kv_head * cache_stride_head
    values = value_cache + kv_head * cache_stride_head

    half: tl.constexpr = HEAD_DIM // 2
    angles = cos_sin + tl.load(positions + sequence, cache_modifier=".cg").to(tl.int64) * HEAD_DIM
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
        _ask_for_first(
            keys, values, table, start, end, cache_stride_block, cache_stride_token, BLOCK_SIZE, HEAD_DIM, LINES, AHEAD
        )
    wait_for_previous(DEPENDENT)

    token_qkv = qkv + sequence * ((GROUP + 2) * KV_HEADS * HEAD_DIM)
    query_at = token_qkv + (kv_head * GROUP + row)[:, None] * HEAD_DIM
    key_at = token_qkv + (GROUP * KV_HEADS + kv_head) * HEAD_DIM
    makes_key = in_head & is_last
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

    new_key = new_key.to(tl.float32).to(key_cache.dtype.element_ty)
    new_value = new_value.to(tl.float32).to(value_cache.dtype.element_ty)

    # start with the new token, if this item has it
    new_score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1) * scale
    largest = tl.where(is_last, new_score, float("-inf"))
    # a sum for each place in the tile, reduced only at the end: that saves a reduction across warps in every step
    counts = (tl.arange(0, TILE) == 0) & is_last
    weight_sum = tl.zeros((ROWS, TILE), tl.float32) + tl.where(counts, 1.0, 0.0)[None, :]
    total = tl.zeros((ROWS, LANES), tl.float32) + new_value.to(tl.float32)
    query = query_beside(key_cache, query)
    if PAIRED:
        key_pairs = keys.to(tl.pointer_type(tl.int16))
        value_pairs = values.to(tl.pointer_type(tl.int16))
        pair_lane = tl.arange(0, LANES // 2)
        query, second_query = tl.split(tl.reshape(query, (ROWS, LANES // 2, 2)))
        total, second_total = tl.split(tl.reshape(total, (ROWS, LANES // 2, 2)))
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        token = first + tl.arange(0, TILE)
        inside = token < end
        place = block.to(tl.int64) * cache_stride_block + token % BLOCK_SIZE * cache_stride_token
        whole_rows: tl.constexpr = HEAD_DIM == LANES
        if PAIRED:
            at = (place // 2)[:, None] + pair_lane[None, :]
            readable = inside[:, None] if whole_rows else inside[:, None] & (2 * pair_lane < HEAD_DIM)[None, :]
            key, second_key = unpaired(tl.load(key_pairs + at, mask=readable, other=0), query.dtype)
            value, second_value = unpaired(tl.load(value_pairs + at, mask=readable, other=0), query.dtype)
            score = tl.dot(query, tl.trans(key), input_precision="ieee")
            score = tl.dot(second_query, tl.trans(second_key), score, input_precision="ieee")
        else:
            at = place[:, None] + lane[None, :]
            readable = inside[:, None] if whole_rows else inside[:, None] & in_head[None, :]
            key = tl.load(keys + at, mask=readable, other=0.0).to(query.dtype)
            value = tl.load(values + at, mask=readable, other=0.0).to(query.dtype)
            score = tl.dot(query, tl.trans(key), input_precision="ieee")
        weight, shrink, largest, weight_sum = _weighted(score * scale, inside, largest, weight_sum)
        weight = weight.to(query.dtype)
        total = tl.dot(weight, value, total * shrink, input_precision="ieee")
        if PAIRED:
            second_total = tl.dot(weight, second_value, second_total * shrink, input_precision="ieee")
        # the next step's blocks, so that its keys' addresses are known when their loads are issued
        block = tl.load(table + (token + TILE) // BLOCK_SIZE, mask=token + TILE < end, other=0)
    if PAIRED:
        total = tl.interleave(total, second_total)
    normaliser = tl.sum(weight_sum, axis=1)
    total = total / normaliser[:, None]

    slot = tl.load(slots + sequence).to(tl.int64)
    place = slot // BLOCK_SIZE * cache_stride_block + slot % BLOCK_SIZE * cache_stride_token
    tl.store(keys + place + lane[None, :], new_key, mask=makes_key[None, :] & (slot >= 0))
    tl.store(values + place + lane[None, :], new_value, mask=makes_key[None, :] & (slot >= 0))

    if end_item - first_item == 1:
        total = tl.where(end >= 0, total, 0.0)  # end < 0: a padded row
        tl.store(out_at, total.to(out.dtype.element_ty), mask=whole)
    else:
        part_rows = (kv_head * items + item).to(tl.int64) * GROUP + row
        tl.store(parts + part_rows[:, None] * HEAD_DIM + lane[None, :], total, mask=whole)
        tl.store(part_scales + part_rows, largest + tl.log2(normaliser), mask=row < GROUP)
        if is_last_to_arrive(arrived + kv_head * items + first_item, end_item - first_item):
            merged = _merged(
                parts, part_scales, kv_head * items, first_item, end_item,
                GROUP, GROUP_ROWS, HEAD_DIM, LANES, MERGED,
            )  # fmt: skip
            member = tl.arange(0, GROUP_ROWS)
            exists = (member < GROUP)[:, None] & in_head[None, :]
            head = sequence * KV_HEADS * GROUP + kv_head * GROUP + member
            merged_at = out + head[:, None] * HEAD_DIM + lane[None, :]
            tl.store(merged_at, merged.to(out.dtype.element_ty), mask=exists)


def _shares(num_kv_heads: int, device: torch.device) -> int:
    """How many programs run at once for each KV head."""
    return max(1, _PROGRAMS_PER_SM * multiprocessors(device) // num_kv_heads)


def _at_once(num_kv_heads: int, device: torch.device) -> int:
    """The same, if there are more sequences than shares."""
    return max(1, _MOST_PER_SM * multiprocessors(device) // num_kv_heads)


def plan_decode(block_tables: Tensor, seq_lens: Tensor, key_cache: Tensor) -> DecodeAttention:
    """`kernels.attention.plan_decode` for CUDA tensors, in one launch.

    The plan [5, items] lists the programs' work for each KV head. An item has a sequence (-1: nothing to do), its first
    cached key and the one after its last, and the first item of that sequence and the one after its last. A padded row
    is an item whose keys end at -1. At least one other launch must come between this and the plan's use
    (`kernels.cuda.triton_launch`).
    """
    rows = len(seq_lens)
    num_kv_heads, head_dim = key_cache.shape[2:]
    shares = _shares(num_kv_heads, seq_lens.device)
    at_once = _at_once(num_kv_heads, seq_lens.device)
    if num_kv_heads * (rows + shares) > MAX_ARRIVALS:
        shares, at_once = 1, rows  # then nothing is cut
    plan = torch.empty((5, rows + shares), dtype=torch.int32, device=seq_lens.device)
    padded = max(16, triton.next_power_of_2(rows))
    _plan_kernel[(1,)](
        seq_lens,
        plan,
        torch.empty(2 * padded, dtype=torch.int32, device=seq_lens.device),
        rows,
        plan.shape[1],
        shares,
        at_once,
        TILE=_tile(head_dim, key_cache.dtype)[0],
        ROWS=padded,
        OTHERS=min(padded, max(1, _COMPARED // padded)),
        num_warps=min(max(padded // 32, 4), 16),
        **dependent(seq_lens.device),
    )
    return DecodeAttention(block_tables, seq_lens, plan)


def _tile(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Keys per step, warps, and pipeline stages of the decode kernel. The plan goes by the cache's dtype, which gives a
    step as many keys as the query's does, or a multiple."""
    if dtype == torch.float32:
        return (32, 4, 2) if head_dim <= 128 else (16, 4, 2)
    return (64, 4, 2) if head_dim <= 128 else (32, 4, 3)


def decode_attention(
    qkv: Tensor, rotation: Rotation, key_cache: Tensor, value_cache: Tensor, batch: DecodeAttention, scale: float
) -> Tensor:
    """`kernels.attention.decode_attention` for CUDA tensors, any block size.

    It is one launch, whose grid depends on shapes alone, so a graph captured once serves all lengths. Padded rows
    (seq_len 0) become zeros. The two caches have equal strides. Calls on one device must not overlap in time, as they
    share `kernels.cuda.triton_arrivals.arrivals`.
    """
    rows = qkv.shape[0]
    block_size, num_kv_heads, head_dim = key_cache.shape[1:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    group = num_heads // num_kv_heads
    group_rows = triton.next_power_of_2(group)
    tile, warps, stages = _tile(head_dim, qkv.dtype)
    lanes = triton.next_power_of_2(head_dim)
    rows_padded = max(16, group_rows)
    items = batch.plan.shape[1]
    paired = value_cache.dtype == E4M3 and lanes >= 2 * _LEAST_INNER
    crowded = rows > _shares(num_kv_heads, qkv.device)
    out = torch.empty((rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    parts = torch.empty((num_kv_heads, items, group, head_dim), dtype=torch.float32, device=qkv.device)
    part_scales = torch.empty((num_kv_heads, items, group), dtype=torch.float32, device=qkv.device)
    _decode_kernel[(num_kv_heads, items)](
        qkv,
        rotation.positions,
        rotation.cos_sin,
        rotation.slots,
        qkv if rotation.q_norm is None else rotation.q_norm,
        qkv if rotation.k_norm is None else rotation.k_norm,
        rotation.eps,
        key_cache,
        value_cache,
        batch.block_tables,
        batch.plan,
        out,
        parts,
        part_scales,
        arrivals(qkv.device),
        scale * math.log2(math.e),
        items,
        *key_cache.stride()[:3],
        batch.block_tables.stride(0),
        BLOCK_SIZE=block_size,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        ROWS=rows_padded,
        GROUP_ROWS=group_rows,
        HEAD_DIM=head_dim,
        LANES=lanes,
        LINES=triton.next_power_of_2(triton.cdiv(head_dim * key_cache.element_size(), _LINE_BYTES)),
        NORM=rotation.q_norm is not None,
        PAIRED=paired,
        TILE=tile,
        AHEAD=_AHEAD,
        STAGES=3 if paired else stages,  # a stage of 8-bit floats has half as many bytes
        MERGED=max(1, min(triton.next_power_of_2(items), _MERGED_ELEMENTS // (group_rows * lanes))),
        num_warps=warps,
        maxnreg=_REGISTERS if crowded and qkv.dtype.itemsize == 2 and rows_padded == 16 and lanes <= 128 else None,
        **dependent(qkv.device),
    )
    return out
