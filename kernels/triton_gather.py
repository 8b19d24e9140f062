# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Paged keys and values laid end to end, for attention that reads packed sequences."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import PrefillAttention

_TOKENS = 8  # tokens a program copies


@triton.jit
def _gather_kernel(
    key_cache,
    value_cache,
    block_tables,
    cu_kv_lens,
    keys,
    values,
    cache_stride_block,
    cache_stride_token,
    cache_stride_head,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sequence = tl.program_id(1)
    start = tl.load(cu_kv_lens + sequence)
    length = tl.load(cu_kv_lens + sequence + 1) - start
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < length
    block = tl.load(block_tables + sequence.to(tl.int64) * table_stride + token // BLOCK_SIZE, mask=inside, other=0).to(
        tl.int64
    )
    element = tl.arange(0, WIDTH)
    place = block * cache_stride_block + token % BLOCK_SIZE * cache_stride_token
    source = place[:, None] + (element // HEAD_DIM * cache_stride_head + element % HEAD_DIM)[None, :]
    target = (start + token).to(tl.int64)[:, None] * (KV_HEADS * HEAD_DIM) + element[None, :]
    mask = inside[:, None] & (element < KV_HEADS * HEAD_DIM)[None, :]
    key = tl.load(key_cache + source, mask=mask)
    value = tl.load(value_cache + source, mask=mask)
    tl.store(keys + target, key, mask=mask)
    tl.store(values + target, value, mask=mask)


def gather_kv(key_cache: Tensor, value_cache: Tensor, batch: PrefillAttention) -> tuple[Tensor, Tensor]:
    """The keys and values of a batch's sequences, packed.

    key_cache, value_cache [N, block_size, Hkv, D] strided CUDA views of equal strides. Returns two tensors
    [sum(batch.kv_lens), Hkv, D]. One launch.
    """
    block_size, num_kv_heads, head_dim = key_cache.shape[1:]
    keys = torch.empty((sum(batch.kv_lens), num_kv_heads, head_dim), dtype=key_cache.dtype, device=key_cache.device)
    values = torch.empty_like(keys)
    grid = (triton.cdiv(max(batch.kv_lens, default=0), _TOKENS), len(batch.kv_lens))
    if grid[0]:
        _gather_kernel[grid](
            key_cache,
            value_cache,
            batch.block_tables,
            batch.cu_kv_lens,
            keys,
            values,
            *key_cache.stride()[:3],
            batch.block_tables.stride(0),
            BLOCK_SIZE=block_size,
            KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            TOKENS=_TOKENS,
            WIDTH=triton.next_power_of_2(num_kv_heads * head_dim),
            num_warps=4,
        )
    return keys, values
