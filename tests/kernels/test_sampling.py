"""The sampling reference against plain definitions, one row at a time."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.sampling import SamplingRows, philox_uniform, sample

VOCAB = 700


def _sample(
    logits: Tensor,
    positions: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 5,
) -> Tensor:
    """One row of logits at many positions."""
    rows = len(positions)
    settings = SamplingRows(
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        torch.full((rows,), seed, dtype=torch.int64),
    )
    return sample(logits.expand(rows, -1), settings, positions)


def _kept(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> NDArray[np.float64]:
    """Probabilities of what is kept, by sorting, in float64."""
    scaled = logits.double().numpy() / temperature
    p = np.exp(scaled - scaled.max())
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        p[scaled < scaled[order[min(top_k, len(p)) - 1]]] = 0
    p /= p.sum()
    likelier = np.array([p[p > value].sum() for value in p])
    if top_p < 1:
        p[likelier >= top_p] = 0
    p[p < min_p * p.max()] = 0
    kept: NDArray[np.float64] = p / p.sum()
    return kept


def _philox(key: int, counter: int) -> int:
    """Philox4x32-10 in Python's integers, first word."""
    c = [counter, 0, 0, 0]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        high0, low0 = divmod(c[0] * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(c[2] * 0xCD9E8D57, 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return c[0]


def test_philox_is_the_published_generator() -> None:
    """The first vector of Random123's kat_vectors, and the definition for other keys and counters."""
    assert _philox(0, 0) == 0x6627E8D5
    for seed, position in [(0, 0), (1, 0), (0, 1), (2**63 + 12345, 77), (2**64 - 1, 2**31 - 1)]:
        seeds = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
        expected = (_philox(seed, position) >> 8) / 2**24
        assert philox_uniform(seeds, torch.tensor([position], dtype=torch.int32)).item() == expected


def test_uniforms_are_uniform_along_positions_and_seeds() -> None:
    along = torch.arange(40_000)
    for u in (philox_uniform(torch.tensor(9), along), philox_uniform(along, torch.tensor(3))):
        counts = torch.histc(u, bins=50, min=0, max=1)
        assert ((counts - 800) ** 2 / 800).sum() < 49 + 5 * math.sqrt(2 * 49)


def test_temperature_zero_takes_the_largest_and_the_first_of_equals() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [40, 600]] = 3.0
    logits[1, 9] = 1.0
    zeros = torch.zeros(2)
    tokens = sample(logits, SamplingRows(zeros, zeros.int(), zeros + 1, zeros, zeros.long()), zeros.int())
    assert tokens.tolist() == [40, 9]
    assert tokens.dtype == torch.int32


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 1.0, 0.0),
        (1.0, 1, 1.0, 0.0),
        (1.3, 20, 1.0, 0.0),
        (1.0, 5000, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0),
        (2.5, 0, 0.97, 0.0),
        (1.0, 0, 1e-6, 0.0),
        (1.0, 0, 1.0, 0.2),
        (0.9, 30, 0.8, 0.05),
    ],
)
@pytest.mark.parametrize("peak", [0.5, 3.0])
def test_tokens_follow_the_plain_definition(
    temperature: float, top_k: int, top_p: float, min_p: float, peak: float
) -> None:
    """Token for token by inverse CDF, but where u lies within rounding of a boundary; and in distribution."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * peak
    positions = torch.arange(4000)
    tokens = _sample(logits, positions, temperature, top_k, top_p, min_p).numpy()
    p = _kept(logits, temperature, top_k, top_p, min_p)
    running = p.cumsum()
    u = philox_uniform(torch.tensor(5), positions).double().numpy()
    clear = np.abs(u[:, None] - running).min(axis=1) > 1e-5
    assert clear.mean() > 0.9
    assert (tokens == np.searchsorted(running, u, side="right"))[clear].all()
    assert set(tokens) <= set(p.nonzero()[0])

    likely = p > 0.002
    expected = 4000 * p[likely]
    seen = np.bincount(tokens, minlength=VOCAB)[likely]
    assert ((seen - expected) ** 2 / expected).sum() < likely.sum() + 5 * math.sqrt(2 * likely.sum())


def test_equal_tokens_are_kept_together() -> None:
    logits = torch.full((VOCAB,), -20.0)
    logits[[3, 5, 8, 13]] = 2.0
    positions = torch.arange(300)
    assert set(_sample(logits, positions, top_k=2).tolist()) == {3, 5, 8, 13}
    assert set(_sample(logits, positions, top_p=0.3).tolist()) == {3, 5, 8, 13}
    assert set(_sample(logits, positions, min_p=1.0).tolist()) == {3, 5, 8, 13}


def test_a_nucleus_larger_than_the_first_look_is_found_whole() -> None:
    logits = torch.zeros(5000)
    logits[4000:] = -30.0
    tokens = _sample(logits, torch.arange(3000), top_p=0.999)
    assert tokens.max() > 3900
    assert tokens.max() < 4000


def test_barred_tokens_are_never_drawn() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[7, 70]] = 0.0
    for settings in ({}, {"top_k": 10}, {"top_p": 0.99}, {"min_p": 0.1}, {"temperature": 100.0}):
        assert set(_sample(logits, torch.arange(100), **settings).tolist()) == {7, 70}


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(4)
    rows = 24
    logits = torch.randn(rows, VOCAB, generator=generator) * 2
    settings = SamplingRows(
        torch.rand(rows, generator=generator).mul(2).where(torch.arange(rows) % 3 > 0, 0.0),
        torch.randint(0, 60, (rows,), generator=generator, dtype=torch.int32),
        torch.rand(rows, generator=generator) * 0.5 + 0.5,
        torch.rand(rows, generator=generator) * 0.2,
        torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
    )
    positions = torch.randint(0, 9000, (rows,), generator=generator, dtype=torch.int32)
    together = sample(logits, settings, positions)
    for row in range(rows):
        own = settings.select(partial(torch.narrow, dim=0, start=row, length=1))
        alone = sample(logits[row : row + 1], own, positions[row : row + 1])
        assert int(alone) == int(together[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_sampled_as_their_float32_values(dtype: torch.dtype) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(6)).to(dtype)
    positions = torch.arange(200)
    assert torch.equal(_sample(logits, positions, top_p=0.9), _sample(logits.float(), positions, top_p=0.9))


@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1)])
def test_a_row_that_overflowed_gets_a_token_of_the_vocabulary(
    logit: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    token = _sample(torch.full((VOCAB,), logit), torch.arange(3), temperature, top_k, top_p, min_p)
    assert bool(((token >= 0) & (token < VOCAB)).all())
