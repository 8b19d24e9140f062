import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load.bisection import Bisection
from benchmarks.load.config import LoadConfig
from benchmarks.load.processes import split


@given(st.floats(8, 24), st.integers(1, 8))
def test_it_comes_within_the_last_step_of_the_highest_rate(capacity: float, trials: int) -> None:
    search = Bisection(8, 24)
    tried: list[float] = []
    for _ in range(trials):
        tried.append(search.rate)
        search.tell(search.rate <= capacity)
    step = 16 / 2**trials
    assert len(set(tried)) == trials
    assert all(8 < rate < 24 for rate in tried)
    if search.best is None:
        assert capacity < 8 + step
    else:
        assert search.best in tried
        assert search.best <= capacity <= search.best + step


def test_the_best_is_a_rate_that_was_tried_with_success() -> None:
    search = Bisection(0, 16)
    for kept_up in (True, False, True):
        search.tell(kept_up)
    assert (search.low, search.best, search.high) == (10, 10, 12)
    hopeless = Bisection(0, 16)
    hopeless.tell(False)
    assert hopeless.best is None


def test_a_load_is_split_into_loads_that_sum_to_it_and_share_no_seed() -> None:
    seeds: set[int] = set()
    for trial in range(5):
        parts = split(LoadConfig(rate=10.0, seed=trial, prompt_tokens="7"), 4)
        assert sum(part.rate or 0 for part in parts) == pytest.approx(10.0)
        assert {part.prompt_tokens for part in parts} == {"7"}
        seeds.update(part.seed for part in parts)
    assert len(seeds) == 20
