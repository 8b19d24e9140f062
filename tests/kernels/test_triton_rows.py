"""Norms, activation, rope with the write into blocks, and the bookkeeping of a step."""

import pytest
import torch

from kernels.fp8 import E4M3

checks = pytest.importorskip("tests.kernels.checks", exc_type=ImportError)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 576), (5, 1024), (2, 2560)])
def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    checks.check_rms_norm(rows, width, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 24), (3, 1536), (2, 3072)])
def test_silu_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    checks.check_silu_mul(rows, width, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(9, 3, 64, 16), (16, 8, 128, 16), (4, 4, 80, 1), (6, 2, 96, 5), (8, 1, 256, 32)],
)
def test_rope_write_kv(
    heads: int, kv_heads: int, head_dim: int, block_size: int, with_norm: bool, dtype: torch.dtype
) -> None:
    checks.check_rope_write_kv(7, heads, kv_heads, head_dim, block_size, with_norm, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 80)])
def test_rope_write_8_bit_kv(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    checks.check_rope_write_kv(70, heads, kv_heads, head_dim, 16, heads == 4, dtype, cache_dtype=E4M3)


def test_nothing_to_do() -> None:
    checks.check_rms_norm(0, 64, torch.float32)
    checks.check_silu_mul(0, 64, torch.float32)


@pytest.mark.parametrize(("rows", "block_size"), [(1, 16), (200, 5)])
def test_step(rows: int, block_size: int) -> None:
    checks.check_step(rows, block_size)


def test_step_that_keeps_tokens() -> None:
    checks.check_step(200, 5, history=21)


@pytest.mark.parametrize(
    ("lengths", "count", "block_size"), [([0], 1, 16), ([9, -1, 1, 0, 40], 4, 4), ([5000, 2048, 2049, 7, -1], 7, 16)]
)
def test_drafts(lengths: list[int], count: int, block_size: int) -> None:
    checks.check_drafts(lengths, count, block_size)


def test_drafts_where_little_is_said_twice() -> None:
    checks.check_drafts([300, 301, 302], 3, 16, vocab=5_000)
