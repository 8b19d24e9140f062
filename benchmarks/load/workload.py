"""The requests of a load, and when they arrive. The seed decides all of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from benchmarks.load.config import LoadConfig
from benchmarks.load.lengths import parse_lengths


@dataclass(frozen=True, slots=True)
class Request:
    prompt: tuple[int, ...]
    output_tokens: int


def requests(config: LoadConfig, vocabulary: range, longest: int) -> Iterator[Request]:
    """Prompts of random tokens, without end.

    Args:
        vocabulary: the tokens to draw from.
        longest: most tokens of prompt and output together; longer ones are cut, the output first.
    """
    random = Random(config.seed)
    prompt_length, output_length = parse_lengths(config.prompt_tokens), parse_lengths(config.output_tokens)
    prefixes = [_tokens(random, vocabulary, config.prefix_tokens) for _ in range(config.prefixes)]
    while True:
        prefix = random.choice(prefixes)
        prompt = (prefix + _tokens(random, vocabulary, prompt_length(random)))[: longest - 1]
        yield Request(prompt, min(output_length(random), longest - len(prompt)))


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Arrival times, in seconds from the start, of a Poisson process of `rate` requests a second."""
    random, time = Random(f"arrivals {seed}"), 0.0
    while True:
        time += random.expovariate(rate)
        yield time


def _tokens(random: Random, vocabulary: range, count: int) -> tuple[int, ...]:
    return tuple(random.choices(vocabulary, k=count))
