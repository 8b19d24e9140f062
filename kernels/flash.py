"""Prefill attention by flash-attn (Dao, "FlashAttention-2", 2023) where it is the faster one; imported only where
flash-attn is installed.

Its paged kernels want blocks of a multiple of 256 tokens, so cached context is gathered into packed keys and values
first: 2 * kv_len * Hkv * D elements read and written, for 4 * query_len * kv_len * Hq * D operations that follow.
Measured on an H100 that is faster than Triton's kernel reading scattered blocks; without context Triton's is the
faster (docs/kernels.md).
"""

import torch
from flash_attn import flash_attn_varlen_func
from torch import Tensor

from kernels import triton_attention
from kernels.attention import PrefillAttention
from kernels.triton_gather import gather_kv

_HEAD_DIMS = (64, 128)
_DTYPES = (torch.bfloat16, torch.float16)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PrefillAttention, scale: float
) -> Tensor:
    """`kernels.attention.prefill_attention` for CUDA tensors: flash-attn's for batches with cached context, in bfloat16
    or float16 with head_dim 64 or 128; Triton's for the rest."""
    has_context = batch.query_lens != batch.kv_lens
    if not has_context or q.dtype not in _DTYPES or q.shape[2] not in _HEAD_DIMS:
        return triton_attention.prefill_attention(q, k, v, key_cache, value_cache, batch, scale)
    k, v = gather_kv(key_cache, value_cache, batch)
    attended: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        batch.cu_query_lens,
        batch.cu_kv_lens,
        max(batch.query_lens),
        max(batch.kv_lens),
        softmax_scale=scale,
        causal=True,
    )
    return attended
