"""What FlashAttention-3 is asked for, of one that is written out here; `tests/gpu` asks the real one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kernels import flash_attention_3
from tests.kernels import checks
from tests.kernels.inputs import causal_attention


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


@pytest.mark.parametrize("padding", [(0, 0), (7, 3)])
@pytest.mark.parametrize(("query_lens", "kv_lens"), [((33, 1), (33, 1)), ((20, 1, 5), (52, 40, 5))])
def test_it_is_told_what_the_batch_attends_to(
    written: Written, query_lens: tuple[int, ...], kv_lens: tuple[int, ...], padding: tuple[int, int]
) -> None:
    checks.check_prefill_attention(
        query_lens,
        kv_lens,
        4,
        2,
        64,
        16,
        torch.float16,
        padding=padding,
        attend=flash_attention_3.prefill_attention,
    )
    assert written.splits == [0]


def test_only_small_batches_are_cut(written: Written) -> None:
    for tokens in (flash_attention_3.CUT_TOKENS, flash_attention_3.CUT_TOKENS + 1):
        checks.check_prefill_attention(
            (tokens,), (tokens,), 1, 1, 64, 16, torch.float16, attend=flash_attention_3.prefill_attention
        )
    assert written.splits == [0, 1]


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float32), (80, torch.float16)])
def test_what_it_is_not_made_for_goes_to_triton(written: Written, head_dim: int, dtype: torch.dtype) -> None:
    checks.check_prefill_attention(
        (20, 5), (52, 5), 2, 1, head_dim, 16, dtype, attend=flash_attention_3.prefill_attention
    )
    assert not written.splits


@pytest.mark.parametrize(("installed", "capability", "wanted"), [(True, 9, True), (True, 8, False), (False, 9, False)])
def test_it_is_for_hopper_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: bool, capability: int, wanted: bool
) -> None:
    monkeypatch.setattr(flash_attention_3, "_MODULE", SimpleNamespace() if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    assert flash_attention_3.usable(torch.device("cuda", 0)) is wanted


def test_one_that_cannot_be_loaded_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert flash_attention_3._load() is None
