import statistics
from random import Random

import pytest

from benchmarks.load.lengths import parse_lengths


def draw(text: str, count: int = 5_000) -> list[int]:
    lengths, random = parse_lengths(text), Random(1)
    return [lengths(random) for _ in range(count)]


def test_fixed() -> None:
    assert set(draw("7")) == {7}


def test_uniform() -> None:
    lengths = draw("uniform:3,6")
    assert set(lengths) == {3, 4, 5, 6}
    assert statistics.mean(lengths) == pytest.approx(4.5, abs=0.1)


def test_lognormal() -> None:
    lengths = draw("lognormal:200,0.5")
    assert statistics.median(lengths) == pytest.approx(200, rel=0.05)
    assert statistics.quantiles(lengths, n=100)[83] == pytest.approx(200 * 2.718**0.5, rel=0.05)  # one sigma up
    assert min(draw("lognormal:1,3")) == 1


def test_the_seed_decides() -> None:
    assert draw("lognormal:200,0.5") == draw("lognormal:200,0.5")


@pytest.mark.parametrize(
    "text", ["", "0", "1.5", "x", "uniform:5", "uniform:5,4", "uniform:0,4", "lognormal:0.5,1", "lognormal:9,-1", "1,2"]
)
def test_what_is_no_distribution(text: str) -> None:
    with pytest.raises(ValueError, match="is not N, uniform"):
        parse_lengths(text)
