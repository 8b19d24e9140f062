"""Random inputs for kernels, and how their outputs are compared."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.attention import PrefillAttention
from kernels.fp8 import E4M3, rounded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# where x is rounded before it becomes an 8-bit float, now and then it becomes the next of these, an eighth away
ROUNDED_TOLERANCE = 3e-2


def require_dot(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes garbage in tl.dot of bfloat16")


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """By relative norm; expected in a higher precision. tolerance: None is that of actual's dtype."""
    assert actual.shape == expected.shape
    wide = expected.double()
    error = (actual.double() - wide).norm() / wide.norm().clamp(min=1e-30)
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    assert error <= limit, f"relative error {error:.2e}"  # NaN fails too


@dataclass(frozen=True)
class Paged:
    """A layer's caches as strided views of a pool, sequences scattered over it; all else in the pool is NaN."""

    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    keys: list[Tensor]  # of each sequence [len, Hkv, D], in the dtype of queries, and rounded if the caches are E4M3
    values: list[Tensor]


def paged(
    lengths: tuple[int, ...],
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
) -> Paged:
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 3
    pool = torch.full((num_blocks, 2, 2, block_size, kv_heads, head_dim), torch.nan, device=DEVICE)
    pool = pool.to(cache_dtype or dtype)
    key_cache, value_cache = pool[:, 1, 0], pool[:, 1, 1]
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    tables = torch.zeros(len(lengths), max(counts) + 2, dtype=torch.int32, device=DEVICE)
    keys, values = [], []
    taken = 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks = order[taken : taken + count]
        taken += count
        tables[row, :count] = blocks.int()
        key = randn(length, kv_heads, head_dim, dtype=dtype, seed=2 * row)
        value = randn(length, kv_heads, head_dim, dtype=dtype, seed=2 * row + 1)
        if cache_dtype == E4M3:
            key, value = rounded(key).to(dtype), rounded(value).to(dtype)
        token = torch.arange(length, device=DEVICE)
        key_cache[blocks[token // block_size], token % block_size] = key.to(pool.dtype)
        value_cache[blocks[token // block_size], token % block_size] = value.to(pool.dtype)
        keys.append(key)
        values.append(value)
    return Paged(key_cache, value_cache, tables, keys, values)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The last len(q) tokens of a sequence attending to it, in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    hidden = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q)).logical_not()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def prefill_batch(
    query_lens: tuple[int, ...], kv_lens: tuple[int, ...], block_tables: Tensor, padding: int = 0
) -> PrefillAttention:
    """`padding`: sequences of no length after the others."""

    cu_query_lens = torch.tensor([0, *query_lens, *[0] * padding]).cumsum(0).int().to(DEVICE)
    seq_lens = torch.tensor([*kv_lens, *[0] * padding]).int().to(DEVICE)
    tables = torch.cat([block_tables, block_tables.new_zeros(padding, block_tables.shape[1])])
    return PrefillAttention(query_lens, kv_lens, cu_query_lens, seq_lens, tables)
