"""Our histogram tells what prometheus_client's would."""

import math
import random

from prometheus_client import CollectorRegistry, Histogram, generate_latest

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


def told(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]
