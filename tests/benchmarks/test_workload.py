from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest

from benchmarks.load.config import LoadConfig, check
from benchmarks.load.workload import Request, arrivals, requests

VOCABULARY = range(100, 200)


def take(config: LoadConfig, count: int = 50, longest: int = 10_000) -> list[Request]:
    return list(islice(requests(config, VOCABULARY, longest), count))


def test_the_seed_decides() -> None:
    config = LoadConfig(prompt_tokens="uniform:1,50", output_tokens="uniform:1,50", prefix_tokens=3, prefixes=2)
    assert take(config) == take(config)
    assert take(config) != take(LoadConfig(prompt_tokens="uniform:1,50", output_tokens="uniform:1,50", seed=1))


def test_prompts_share_prefixes() -> None:
    prompts = [request.prompt for request in take(LoadConfig(prompt_tokens="8", prefix_tokens=16, prefixes=3))]
    assert {len(prompt) for prompt in prompts} == {24}
    assert len({prompt[:16] for prompt in prompts}) == 3
    assert len({prompt[16:] for prompt in prompts}) == len(prompts)
    assert {token for prompt in prompts for token in prompt} <= set(VOCABULARY)


def test_what_is_too_long_is_cut() -> None:
    assert [len(request.prompt) for request in take(LoadConfig(prompt_tokens="50"), 1, longest=20)] == [19]
    assert take(LoadConfig(prompt_tokens="15", output_tokens="9"), 1, longest=20)[0].output_tokens == 5


def test_arrivals_are_a_poisson_process() -> None:
    times = [0.0, *islice(arrivals(rate=4.0, seed=1), 20_000)]
    gaps = np.array([later - earlier for earlier, later in pairwise(times)])
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.03)  # an exponential's deviation is its mean
    assert (gaps > 0.5).mean() == pytest.approx(np.exp(-2), rel=0.05)
    assert times == [0.0, *islice(arrivals(rate=4.0, seed=1), 20_000)]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"rate": 1.0, "concurrency": 1}, "not both"),
        ({"concurrency": 0}, "--concurrency must be at least 1"),
        ({"prefix_tokens": -1}, "--prefix-tokens must be at least 0"),
        ({"rate": 0.0}, "--rate must be above 0"),
        ({"output_tokens": "many"}, "'many' is not N"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check(LoadConfig(**wrong))
