# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Per-head norm, rotation and writing K and V in one launch on CUDA; `kernels.rope` holds the reference."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.triton_launch import dependent, wait_for_previous
from kernels.rope import Rotation

_HEADS = 8  # heads of one token that a program handles


@triton.jit
def _rope_write_kernel(
    qkv,
    positions,
    cos_sin,
    slots,
    key_cache,
    value_cache,
    q_norm,
    k_norm,
    eps,
    cache_stride_block,
    cache_stride_token,
    cache_stride_head,
    BLOCK_SIZE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    ROUNDED: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lane = tl.arange(0, LANES)
    is_q = head < Q_HEADS
    is_v = head >= Q_HEADS + KV_HEADS
    is_k = (head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS)
    exists = (head < Q_HEADS + 2 * KV_HEADS)[:, None] & (lane < HALF)[None, :]

    low_at = qkv + (token * (Q_HEADS + 2 * KV_HEADS) + head[:, None]) * (2 * HALF) + lane[None, :]
    high_at = low_at + HALF
    wait_for_previous(DEPENDENT)
    low = tl.load(low_at, mask=exists, other=0.0)
    high = tl.load(high_at, mask=exists, other=0.0)
    position = tl.load(positions + token).to(tl.int64)
    cos = tl.load(cos_sin + position * (2 * HALF) + lane, mask=lane < HALF, other=0.0)[None, :]
    sin = tl.load(cos_sin + position * (2 * HALF) + HALF + lane, mask=lane < HALF, other=0.0)[None, :]
    slot = tl.load(slots + token).to(tl.int64)

    dtype = low.dtype
    a, b = low.to(tl.float32), high.to(tl.float32)
    if NORM:
        q_low = tl.load(q_norm + lane, mask=lane < HALF, other=0.0)[None, :]
        q_high = tl.load(q_norm + HALF + lane, mask=lane < HALF, other=0.0)[None, :]
        k_low = tl.load(k_norm + lane, mask=lane < HALF, other=0.0)[None, :]
        k_high = tl.load(k_norm + HALF + lane, mask=lane < HALF, other=0.0)[None, :]
        inverse = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]
        # rounds where the reference rounds: after the normalisation, and after the weight
        a = (a * inverse).to(dtype).to(tl.float32) * tl.where(is_q[:, None], q_low, k_low).to(tl.float32)
        b = (b * inverse).to(dtype).to(tl.float32) * tl.where(is_q[:, None], q_high, k_high).to(tl.float32)
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    rotated_low = (a * cos - b * sin).to(dtype)
    rotated_high = (b * cos + a * sin).to(dtype)
    if ROUNDED:
        key_low = tl.where(is_v[:, None], low, rotated_low).to(tl.float32).to(key_cache.dtype.element_ty)
        key_high = tl.where(is_v[:, None], high, rotated_high).to(tl.float32).to(key_cache.dtype.element_ty)
        value_low, value_high = key_low, key_high
        rotated_low = tl.where(is_q[:, None], rotated_low, key_low.to(tl.float32).to(dtype))
        rotated_high = tl.where(is_q[:, None], rotated_high, key_high.to(tl.float32).to(dtype))
        changes = exists
    else:
        key_low, key_high, value_low, value_high = rotated_low, rotated_high, low, high
        changes = exists & (head < Q_HEADS + KV_HEADS)[:, None]
    tl.store(low_at, rotated_low, mask=changes)
    tl.store(high_at, rotated_high, mask=changes)

    if slot >= 0:
        place = slot // BLOCK_SIZE * cache_stride_block + slot % BLOCK_SIZE * cache_stride_token
        key_at = key_cache + place + (head - Q_HEADS)[:, None] * cache_stride_head + lane[None, :]
        value_at = value_cache + place + (head - Q_HEADS - KV_HEADS)[:, None] * cache_stride_head + lane[None, :]
        tl.store(key_at, key_low, mask=exists & is_k[:, None])
        tl.store(key_at + HALF, key_high, mask=exists & is_k[:, None])
        tl.store(value_at, value_low, mask=exists & is_v[:, None])
        tl.store(value_at + HALF, value_high, mask=exists & is_v[:, None])


def rope_write_kv(
    qkv: Tensor, rotation: Rotation, key_cache: Tensor, value_cache: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.rope.rope_write_kv` for CUDA tensors. The two caches have equal strides."""
    block_size, num_kv_heads, head_dim = key_cache.shape[1:]
    tokens = qkv.shape[0]
    heads = qkv.view(tokens, -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    if tokens:
        _rope_write_kernel[(tokens, triton.cdiv(heads.shape[1], _HEADS))](
            qkv,
            rotation.positions,
            rotation.cos_sin,
            rotation.slots,
            key_cache,
            value_cache,
            qkv if rotation.q_norm is None else rotation.q_norm,
            qkv if rotation.k_norm is None else rotation.k_norm,
            rotation.eps,
            *key_cache.stride()[:3],
            BLOCK_SIZE=block_size,
            Q_HEADS=num_heads,
            KV_HEADS=num_kv_heads,
            HALF=head_dim // 2,
            NORM=rotation.q_norm is not None,
            ROUNDED=key_cache.dtype != qkv.dtype,
            HEADS=_HEADS,
            LANES=triton.next_power_of_2(head_dim // 2),
            num_warps=4,
            **dependent(qkv.device),
        )
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    return q, k, v
