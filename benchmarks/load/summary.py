"""The figures of a load, from its records."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from benchmarks.load.config import Limits
from benchmarks.load.record import Record


@dataclass(frozen=True, slots=True)
class Distribution:
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Latencies and tokens are those of answered requests. Rates are per second of `seconds`, which last from when the
    first request was due to the end of the last. None: no request had such a figure."""

    requests: int
    errors: dict[str, int]
    seconds: float
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    end_to_end: Distribution | None
    requests_per_second: float
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    goodput: float
    """Answered requests within the limits, per second."""
    goodput_share: float
    """The same as a share of all requests, failed ones included."""
    prefill_cached_share: float
    """Share of prompt tokens that the prefill workers did not compute."""
    decode_cached_share: float
    resumes: int


def summarize(records: Sequence[Record], limits: Limits) -> Summary:
    """
    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("no request was sent")
    answered = [record for record in records if record.error is None]
    seconds = max(record.ended for record in records) - min(record.due for record in records)
    prompt_tokens = sum(record.prompt_tokens for record in answered)
    good = sum(_keeps(record, limits) for record in answered)
    return Summary(
        requests=len(records),
        errors=dict(Counter(record.error for record in records if record.error is not None).most_common()),
        seconds=seconds,
        ttft=_distribution(record.ttft for record in answered),
        tpot=_distribution(record.tpot for record in answered),
        itl=_distribution(chain.from_iterable(record.itl for record in answered)),
        end_to_end=_distribution(record.end_to_end for record in answered),
        requests_per_second=len(answered) / seconds,
        output_tokens_per_second=sum(record.output_tokens for record in answered) / seconds,
        prompt_tokens_per_second=prompt_tokens / seconds,
        goodput=good / seconds,
        goodput_share=good / len(records),
        prefill_cached_share=sum(record.prefill_cached_tokens for record in answered) / max(prompt_tokens, 1),
        decode_cached_share=sum(record.decode_cached_tokens for record in answered) / max(prompt_tokens, 1),
        resumes=sum(record.resumes for record in answered),
    )


def _keeps(record: Record, limits: Limits) -> bool:
    return all(
        limit is None or value is None or value * 1000 <= limit
        for value, limit in ((record.ttft, limits.ttft_limit), (record.tpot, limits.tpot_limit))
    )


def _distribution(seconds: Iterable[float | None]) -> Distribution | None:
    milliseconds = np.array([value * 1000 for value in seconds if value is not None])
    if not milliseconds.size:
        return None
    p50, p90, p99 = np.percentile(milliseconds, (50, 90, 99))
    return Distribution(float(milliseconds.mean()), float(p50), float(p90), float(p99))
