"""A soak's report as tables."""

from collections.abc import Iterator

from rich.table import Table

from tests.e2e.soak.callers import WAYS
from tests.e2e.soak.run import Report


def tables(report: Report) -> Iterator[Table]:
    tally = report.tally
    outcomes = sorted({outcome for _, outcome in tally.counts}, key=lambda outcome: (outcome.isupper(), outcome))
    requests = Table("requests", *outcomes, "all", title="how requests ended")
    for way in WAYS:
        counts = [tally.counts[way, outcome] for outcome in outcomes]
        requests.add_row(way, *map(_figure, counts), _figure(sum(counts)))
    sums = [sum(tally.counts[way, outcome] for way in WAYS) for outcome in outcomes]
    requests.add_row("all", *map(_figure, sums), _figure(sum(sums)))
    yield requests

    answers = Table("answered", "requests", title="answers, each compared with that of the undisturbed cluster")
    for kind, count in sorted(tally.kinds.items()):
        answers.add_row(kind, _figure(count))
    answers.add_row("tokens", _figure(tally.answered_tokens))
    answers.add_row("resumes", _figure(tally.resumes))
    answers.add_row("slowest request", f"{tally.slowest_seconds:.1f} s")
    yield answers

    faults = Table("part", "kill -9", "SIGTERM", "SIGSTOP", title="what was done to the parts")
    for part in sorted({part for part, _ in report.faults}):
        faults.add_row(part, *(_figure(report.faults[part, fault]) for fault in ("kill", "drain", "stop")))
    yield faults

    held = Table(
        "part", "files", "threads", "memory MiB", title="held at the first, the middle and the last quiet point"
    )
    points = report.quiet_points
    chosen = [points[place].holdings for place in (0, len(points) // 2, -1)]
    for part in chosen[0]:
        own = [holdings[part] for holdings in chosen]
        held.add_row(
            part,
            " ".join(str(holdings.files) for holdings in own),
            " ".join(str(holdings.threads) for holdings in own),
            " ".join(f"{holdings.memory_mib:.0f}" for holdings in own),
        )
    yield held


def _figure(count: int) -> str:
    return f"{count:,}" if count else ""
