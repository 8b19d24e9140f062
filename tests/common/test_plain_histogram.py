"""Our histogram tells what prometheus_client's would."""

import math
import random

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.registry import Collector

from common.telemetry.plain_histogram import PlainHistogram

BUCKETS = (0.001, 0.0025, 0.5, 1, 30)


def test_it_tells_what_the_librarys_own_tells() -> None:
    ours, its = CollectorRegistry(), CollectorRegistry()
    plain = PlainHistogram("gap_seconds", "Gaps", BUCKETS, ours)
    library = Histogram("gap_seconds", "Gaps", buckets=BUCKETS, registry=its)
    assert told(ours) == told(its)
    draw = random.Random(3)
    for value in (*BUCKETS, 0.0, 31.0, 1e9, *(math.exp(draw.uniform(-8, 4)) for _ in range(500))):
        plain.observe(value)
        library.observe(value)
    assert told(ours) == told(its)
    names = ["gap_seconds_bucket", "gap_seconds_sum"]
    assert told(ours.restricted_registry(names)) == told(its.restricted_registry(names)) != []
    with pytest.raises(ValueError, match="Duplicated"):
        Histogram("gap_seconds", "Gaps", registry=ours)


def test_it_observes_many_at_once_as_one_by_one() -> None:
    ours, its = CollectorRegistry(), CollectorRegistry()
    at_once, one_by_one = (PlainHistogram("gap_seconds", "Gaps", BUCKETS, registry) for registry in (ours, its))
    draw = random.Random(4)
    values = [0.0, 0.5, 1.0, 30.0, 31.0, *(draw.randrange(1 << 16) / 1024 for _ in range(500))]  # whose sum is exact
    for value in values:
        one_by_one.observe(value)
    at_once.observe_all(np.array(values[:200]))
    at_once.observe_all(np.array(values[200:]))
    assert told(ours) == told(its)


def told(registry: Collector) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]  # which ours does not tell
