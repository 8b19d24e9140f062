"""Sampling: greedy, plain and filtered rows, over smooth, peaked, flat and tied logits."""

from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.sampling import SamplingRows
from tests.kernels.inputs import DEVICE, randn

checks = pytest.importorskip("tests.kernels.checks", exc_type=ImportError)


def settings(rows: int, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[SamplingRows, Tensor]:
    def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=DEVICE)

    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    positions = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    return SamplingRows(column(temperature), column(top_k, torch.int32), column(top_p), column(min_p), seeds), positions


FILTERS = [
    pytest.param(0, 1.0, 0.0, id="none"),
    pytest.param(5, 1.0, 0.0, id="k"),
    pytest.param(0, 0.8, 0.0, id="p"),
    pytest.param(0, 1.0, 0.1, id="min-p"),
    pytest.param(50, 0.9, 0.02, id="all"),
    pytest.param(1, 1.0, 0.0, id="k1"),
    pytest.param(400, 0.95, 0.0, id="wide"),
    pytest.param(10**6, 0.999, 0.0, id="k-above-vocabulary"),
    pytest.param(0, 1e-6, 0.0, id="tiny-p"),
]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize(("vocab", "candidates"), [(7, 4096), (1100, 4096), (1100, 64)], ids=["tiny", "few", "many"])
def test_filters(
    vocab: int, candidates: int, top_k: int, top_p: float, min_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows from flat to peaked. With room for 64 candidates only, thresholds are found by reading logits again."""
    monkeypatch.setattr(checks.triton_sampling, "_CANDIDATES", candidates)
    logits = randn(3, vocab, seed=vocab) * torch.tensor([[0.5], [2.0], [6.0]], device=DEVICE)
    checks.check_sample(logits, *settings(3, 0.8, top_k, top_p, min_p))


@pytest.mark.parametrize("candidates", [4096, 64], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_of_narrow_logits(dtype: torch.dtype, candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.triton_sampling, "_CANDIDATES", candidates)
    logits = (randn(2, 1000, seed=5) * 2).round().to(dtype)  # a dozen different values
    for top_k, top_p, min_p in ((3, 1.0, 0.0), (0, 0.7, 0.0), (300, 0.5, 0.0), (0, 1.0, 0.3)):
        checks.check_sample(logits, *settings(2, 0.9, top_k, top_p, min_p))


@pytest.mark.parametrize("candidates", [4096, 64], ids=["few", "many"])
def test_all_logits_equal(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.triton_sampling, "_CANDIDATES", candidates)
    logits = torch.tensor([[0.0], [-3.5]], device=DEVICE).expand(2, 700).contiguous()
    for top_k, top_p, min_p in ((0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.5)):
        checks.check_sample(logits, *settings(2, 1.0, top_k, top_p, min_p))


def test_greedy_takes_the_first_of_equals() -> None:
    logits = randn(3, 5000, seed=1).clamp(max=1.0)
    logits[1, 4000:] = 9.0
    logits[2] = -torch.inf
    logits[2, 4321] = -50.0
    taken = checks.check_sample(logits, *settings(3, 0.0, 0, 1.0, 0.0))
    assert taken.tolist()[1:] == [4000, 4321]


def test_banned_tokens_are_never_drawn() -> None:
    logits = randn(6, 1600, seed=2)
    logits[:, ::2] = -torch.inf
    logits[:, 512:1024] = -torch.inf
    for top_k, top_p in ((0, 1.0), (40, 1.0), (0, 0.9)):
        taken = checks.check_sample(logits, *settings(6, 1.5, top_k, top_p, 0.0))
        assert bool(((taken % 2 == 1) & ((taken < 512) | (taken >= 1024))).all())


def test_rows_of_all_kinds_in_a_batch_take_what_they_take_alone() -> None:
    rows = 9
    logits = randn(rows, 1200, seed=8) * 3
    sampling, positions = settings(rows, 1.0, 0, 1.0, 0.0)
    sampling.temperature[::4] = 0.0
    sampling.top_k[1::3] = 20
    sampling.top_p[2::3] = 0.85
    sampling.min_p[5::4] = 0.05
    together = checks.check_sample(logits, sampling, positions)
    for row in range(rows):
        own = sampling.select(partial(torch.narrow, dim=0, start=row, length=1))
        alone = checks.triton_sampling.sample(logits[row : row + 1], own, positions[row : row + 1])
        assert int(alone) == int(together[row])


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("left", [[1999], [3, 700, 701]], ids=["one", "few"])
def test_of_the_few_that_a_grammar_leaves_one_is_drawn(
    left: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """All others are -inf, most chunks of the vocabulary through and through."""
    logits = torch.full((3, 2000), -torch.inf, device=DEVICE)
    logits[:, left] = randn(3, len(left), seed=4)
    taken = checks.check_sample(logits, *settings(3, temperature, top_k, top_p, min_p))
    assert set(taken.tolist()) <= set(left)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("logit", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_overflowed_gets_a_token_of_the_vocabulary(
    logit: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.full((2, 700), logit, device=DEVICE)
    scratch = [torch.full((2 * 4096,), 10**9, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    del scratch  # the next allocations of this size get that memory
    tokens = checks.triton_sampling.sample(logits, *settings(2, temperature, top_k, top_p, min_p))
    assert bool(((tokens >= 0) & (tokens < 700)).all())
