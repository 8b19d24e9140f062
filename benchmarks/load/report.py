"""A load's figures as a table, a JSON document and a plot."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from benchmarks.load.config import Limits, LoadConfig
from benchmarks.load.record import Record
from benchmarks.load.summary import Summary


def as_table(summary: Summary) -> Group:
    latencies = Table("milliseconds", "mean", "p50", "p90", "p99")
    for column in latencies.columns[1:]:
        column.justify = "right"
    for name, distribution in (
        ("TTFT, time to first token", summary.ttft),
        ("TPOT, time per output token", summary.tpot),
        ("ITL, inter-token latency", summary.itl),
        ("end to end", summary.end_to_end),
    ):
        figures = asdict(distribution).values() if distribution else ()
        latencies.add_row(name, *(f"{figure:,.1f}" for figure in figures))
    rates = Table(show_header=False)
    rates.add_column()
    rates.add_column(justify="right")
    failed = ", ".join(f"{count} {code}" for code, count in summary.errors.items())
    for name, figure in (
        ("requests", f"{summary.requests:,}"),
        ("failed", failed or "none"),
        ("seconds", f"{summary.seconds:,.1f}"),
        ("requests/s", f"{summary.requests_per_second:,.2f}"),
        ("goodput, requests/s", f"{summary.goodput:,.2f} ({summary.goodput_share:.0%})"),
        ("output tokens/s", f"{summary.output_tokens_per_second:,.1f}"),
        ("prompt tokens/s", f"{summary.prompt_tokens_per_second:,.1f}"),
        ("cached, prefill/decode", f"{summary.prefill_cached_share:.0%} / {summary.decode_cached_share:.0%}"),
        ("resumes", f"{summary.resumes:,}"),
    ):
        rates.add_row(name, figure)
    return Group(latencies, rates)


def as_json(config: LoadConfig, limits: Limits, model: str, records: Sequence[Record], summary: Summary) -> Any:
    """The load, its figures and every request's record, for json.dump."""
    return {
        "model": model,
        "load": asdict(config) | asdict(limits),
        "summary": asdict(summary),
        "requests": [asdict(record) for record in records],
    }


def plot(records: Sequence[Record], title: str, path: Path) -> None:
    """Draws the distributions of TTFT and ITL, and output tokens over time, in the image format that `path` ends in.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; it comes with twostroke[plot].
    """
    from matplotlib.figure import Figure

    answered = [record for record in records if record.error is None]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    first, gaps, rate = figure.subplots(1, 3)
    for axes, name, seconds in (
        (first, "TTFT", [record.ttft for record in answered if record.ttft is not None]),
        (gaps, "ITL", [gap for record in answered for gap in record.itl]),
    ):
        if seconds:
            axes.ecdf([value * 1000 for value in seconds])
        axes.set(title=name, xlabel="ms", ylabel="share of all", ylim=(0, 1))
        axes.grid(alpha=0.3)
    deltas = [delta for record in answered for delta in record.deltas]
    if deltas:
        times, counts = np.array(deltas).T
        width = max(times.max() / 60, 0.1)
        tokens, edges = np.histogram(times, bins=np.arange(0, times.max() + width, width), weights=counts)
        rate.stairs(tokens / width, edges, fill=True, alpha=0.6)
    rate.set(title="output tokens/s", xlabel="s")
    rate.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
