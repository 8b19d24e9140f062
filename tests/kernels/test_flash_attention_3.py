"""What FlashAttention-3 is asked for, of one that is written out here; `tests/gpu` asks the real one."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import SHORT_TOKENS
from kernels.fp8 import E4M3
from tests.kernels.inputs import causal_attention

checks = pytest.importorskip("tests.kernels.checks", exc_type=ImportError)
gpu = pytest.importorskip("kernels.cuda.gpu", exc_type=ImportError)
flash_attention_3 = pytest.importorskip("kernels.cuda.flash_attention_3", exc_type=ImportError)
CUT_TOKENS = flash_attention_3.CUT_TOKENS


class Written:
    """`flash_attn_with_kvcache` of packed queries and paged keys, by its documentation."""

    def __init__(self) -> None:
        self.splits: list[int] = []

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        page_table: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        softmax_scale: float,
        causal: bool,
        num_splits: int,
    ) -> Tensor:
        assert causal
        assert all(tensor.dtype == torch.int32 for tensor in (cache_seqlens, page_table, cu_seqlens_q))
        assert len(cache_seqlens) == len(cu_seqlens_q) - 1
        self.splits.append(num_splits)
        out = torch.full_like(q, torch.nan)
        starts = cu_seqlens_q.tolist()
        for row, (start, end, length) in enumerate(zip(starts, starts[1:], cache_seqlens.tolist(), strict=False)):
            assert end - start <= max_seqlen_q
            if end == start:
                continue
            blocks = page_table[row, : -(-length // k_cache.shape[1])].long()
            keys, values = (cache[blocks].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
            out[start:end] = causal_attention(q[start:end], keys, values, softmax_scale).to(q.dtype)
        return out


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    written = Written()
    monkeypatch.setattr(flash_attention_3, "_MODULE", SimpleNamespace(flash_attn_with_kvcache=written))
    return written


def check(
    query_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    *,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float16,
    padding: tuple[int, int] = (0, 0),
    cache_dtype: torch.dtype | None = None,
) -> None:
    attend = flash_attention_3.prefill_attention
    checks.check_prefill_attention(query_lens, kv_lens, 4, 2, head_dim, block_size, dtype, padding, attend, cache_dtype)


@pytest.mark.parametrize("padding", [(0, 0), (7, 3)])
def test_it_is_told_what_the_batch_attends_to(written: Written, padding: tuple[int, int]) -> None:
    check((300, 1, 212), (300, 40, 252), padding=padding)
    assert written.splits == [1]


def test_few_tokens_with_a_long_context_are_cut_into_parts(written: Written) -> None:
    check((CUT_TOKENS - 5, 5), (600, 5))
    assert written.splits == [0]
    check((CUT_TOKENS + 1,), (600,))
    assert written.splits == [0, 1]


def test_few_tokens_of_short_sequences_go_to_triton(written: Written) -> None:
    unused = 2 * 16  # the tables of these tests have two blocks more than the longest sequence
    check((20, 1), (SHORT_TOKENS - unused, 1))
    assert not written.splits
    check((20, 1), (SHORT_TOKENS - unused + 1, 1))
    assert written.splits == [0]


@pytest.mark.parametrize(
    "other",
    [{"dtype": torch.float32}, {"head_dim": 80}, {"block_size": 64}, {"cache_dtype": E4M3}],
    ids=lambda other: next(iter(other)),
)
def test_what_it_is_not_made_for_goes_to_triton(written: Written, other: dict[str, Any]) -> None:
    check((129,), (600,), **other)
    assert not written.splits


@pytest.mark.parametrize(("installed", "capability", "wanted"), [(True, 9, True), (True, 8, False), (False, 9, False)])
def test_it_is_for_hopper_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: bool, capability: int, wanted: bool
) -> None:
    monkeypatch.setattr(flash_attention_3, "_MODULE", SimpleNamespace() if installed else None)
    monkeypatch.setattr(gpu, "_capability", lambda _: (capability, 0))
    assert flash_attention_3.usable(torch.device("cuda", 0)) is wanted


def test_one_that_cannot_be_loaded_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, flash_attention_3.NAME, raising=False)
    assert flash_attention_3._load() is None
