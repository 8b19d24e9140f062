import pytest

from benchmarks.load.config import Limits
from benchmarks.load.record import Record
from benchmarks.load.summary import summarize


def record(due: float, *deltas: tuple[float, int], error: str | None = None, cached: int = 0) -> Record:
    ended = deltas[-1][0] if deltas else due
    return Record(due, ended, prompt_tokens=10, deltas=deltas, prefill_cached_tokens=cached, error=error)


def test_latencies_of_one_request() -> None:
    one = record(1.0, (1.5, 1), (1.7, 1), (2.3, 4))
    assert one.ttft == pytest.approx(0.5)
    assert one.itl == pytest.approx([0.2, 0.6])  # the message of four tokens ends one gap
    assert one.tpot == pytest.approx(0.8 / 5)
    assert one.end_to_end == pytest.approx(1.3)
    assert one.output_tokens == 6


def test_requests_of_one_message_have_no_pace() -> None:
    one = record(0.0, (0.5, 3))
    assert (one.tpot, one.itl) == (None, [])
    none = record(0.0)
    assert (none.ttft, none.tpot, none.itl, none.output_tokens) == (None, None, [], 0)


def test_percentiles() -> None:
    summary = summarize([record(0.0, (seconds / 1000, 1)) for seconds in range(101)], Limits())
    assert summary.ttft is not None
    assert (summary.ttft.mean, summary.ttft.p50, summary.ttft.p90, summary.ttft.p99) == pytest.approx((50, 50, 90, 99))
    assert summary.tpot is None


def test_rates_and_errors() -> None:
    records = [
        record(2.0, (3.0, 1), (4.0, 1), cached=5),
        record(3.0, (4.0, 1), (7.0, 1)),
        record(4.0, error="UNAVAILABLE"),
        record(5.0, (5.5, 1), error="DEADLINE_EXCEEDED"),
        record(12.0, error="UNAVAILABLE"),
    ]
    summary = summarize(records, Limits())
    assert summary.seconds == 10.0
    assert summary.errors == {"UNAVAILABLE": 2, "DEADLINE_EXCEEDED": 1}
    assert summary.requests_per_second == pytest.approx(0.2)
    assert summary.output_tokens_per_second == pytest.approx(0.4)
    assert summary.prompt_tokens_per_second == pytest.approx(2.0)
    assert summary.prefill_cached_share == pytest.approx(0.25)
    assert summary.goodput_share == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        (Limits(), 3),
        (Limits(ttft_limit=600), 2),
        (Limits(tpot_limit=1000), 2),
        (Limits(ttft_limit=600, tpot_limit=1000), 1),
    ],
)
def test_goodput(limits: Limits, good: int) -> None:
    records = [
        record(0.0, (0.5, 1), (1.5, 1)),  # keeps both
        record(0.0, (0.5, 1), (2.5, 1)),  # too slow later
        record(0.0, (1.0, 1)),  # too slow at first; no pace to judge
        record(0.0, error="RESOURCE_EXHAUSTED"),
    ]
    summary = summarize(records, limits)
    assert summary.goodput_share == pytest.approx(good / 4)
    assert summary.goodput == pytest.approx(good / 2.5)


def test_no_records() -> None:
    with pytest.raises(ValueError, match="no request was sent"):
        summarize([], Limits())
