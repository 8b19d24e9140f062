"""Attention of packed prompts by FlashAttention-3 (Shah et al., "FlashAttention-3: Fast and Accurate Attention with
Asynchrony and Low-precision", 2024), where it is installed; `kernels.attention` holds the reference.

Hopper only, 16-bit types. What it is not made for goes to Triton.
"""

import importlib
import importlib.util
from types import ModuleType

import structlog
import torch
from torch import Tensor

from kernels import triton_prefill_attention
from kernels.attention import PrefillAttention

NAME = "flash_attn_interface"
HEAD_DIMS = (64, 128, 256)
# Batches of up to so many tokens have so few tiles that a long context is better cut into parts, for all processors; in
# larger ones, putting parts together costs more than it saves.
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
    """Whether it is installed, and made for this device."""
    return _MODULE is not None and torch.cuda.get_device_capability(device)[0] == 9


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PrefillAttention, scale: float
) -> Tensor:
    """`kernels.attention.prefill_attention` for CUDA tensors, any block size. All keys are read from the cache, also a
    chunk's own. Nothing but shapes is asked of the host, so that a graph captured once serves all lengths that fit."""
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] not in HEAD_DIMS:
        return triton_prefill_attention.prefill_attention(q, k, v, key_cache, value_cache, batch, scale)
    assert _MODULE is not None
    tokens = q.shape[0]
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
        num_splits=0 if tokens <= CUT_TOKENS else 1,  # 0: as it sees fit
    )
    return out
