"""Attention of packed prompts by FlashAttention-3 (Shah et al., "FlashAttention-3: Fast and Accurate Attention with
Asynchrony and Low-precision", 2024), if it is installed; `kernels.attention` holds the reference.

For Hopper GPUs and 16-bit types only. Batches that it does not support, or is slower at, go to the Triton kernel.
"""

import importlib
import importlib.util
from types import ModuleType

import structlog
import torch
from torch import Tensor

from kernels.attention import FEW_TOKENS, SHORT_TOKENS, PrefillAttention
from kernels.cuda import triton_prefill_attention
from kernels.cuda.gpu import is_hopper

NAME = "flash_attn_interface"
HEAD_DIMS = (64, 128, 256)
# Larger blocks it loads whole, by TMA, including what lies beyond the sequence's end. A NaN that another sequence left
# there would get into the output.
MOST_BLOCK_SIZE = 32
# Up to this many tokens there are too few tiles for all SMs, so a long context is split along the keys. With more
# tokens, merging the splits costs more than they save.
CUT_TOKENS = 128


def _load() -> ModuleType | None:
    if importlib.util.find_spec(NAME) is None:
        return None
    try:
        return importlib.import_module(NAME)
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        structlog.get_logger(__name__).warning("FlashAttention-3 is installed, and cannot be loaded", reason=str(error))
        return None


_MODULE = _load()


def usable(device: torch.device) -> bool:
    """Whether FlashAttention-3 is installed and supports this device."""
    return _MODULE is not None and is_hopper(device)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PrefillAttention, scale: float
) -> Tensor:
    """`kernels.attention.prefill_attention` for CUDA tensors, any block size. All keys are read from the cache, even
    those of the chunk itself. The host needs nothing but shapes, so a graph captured once serves all lengths that fit
    it."""
    tokens, _, head_dim = q.shape
    block_size = key_cache.shape[1]
    short = tokens <= FEW_TOKENS and batch.block_tables.shape[1] * block_size <= SHORT_TOKENS
    one_dtype = key_cache.dtype == q.dtype  # beside KV in 8-bit floats it would want q in them, too
    made_for = one_dtype and q.element_size() == 2 and head_dim in HEAD_DIMS and block_size <= MOST_BLOCK_SIZE
    if short or not made_for:
        return triton_prefill_attention.prefill_attention(q, k, v, key_cache, value_cache, batch, scale)
    assert _MODULE is not None
    out: Tensor = _MODULE.flash_attn_with_kvcache(
        q,
        key_cache,
        value_cache,
        cache_seqlens=batch.seq_lens,
        page_table=batch.block_tables,
        cu_seqlens_q=batch.cu_query_lens,
        max_seqlen_q=tokens,
        softmax_scale=scale,
        causal=True,
        num_splits=0 if tokens <= CUT_TOKENS else 1,  # 0: it decides
    )
    return out
