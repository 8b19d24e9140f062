"""Distributions of lengths in tokens."""

import math
from collections.abc import Callable
from random import Random
from typing import TypeAlias

Lengths: TypeAlias = Callable[[Random], int]
"""Draws a length of at least 1."""


def parse_lengths(text: str) -> Lengths:
    """From "N", "uniform:LOW,HIGH" (both included) or "lognormal:MEDIAN,SIGMA" (SIGMA of the logarithm).

    Raises:
        ValueError: `text` is none of these, or a length below 1.
    """
    kind, colon, rest = text.partition(":")
    try:
        numbers = [float(number) for number in (rest if colon else kind).split(",")]
    except ValueError:
        numbers = []
    match (kind if colon else "fixed", numbers):
        case "fixed", [length] if length >= 1 and length.is_integer():
            return lambda random: int(length)
        case "uniform", [low, high] if 1 <= low <= high and low.is_integer() and high.is_integer():
            return lambda random: random.randint(int(low), int(high))
        case "lognormal", [median, sigma] if median >= 1 and sigma >= 0:
            return lambda random: max(1, round(random.lognormvariate(math.log(median), sigma)))
    raise ValueError(f"{text!r} is not N, uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA with lengths of at least 1")
