"""A soak: mixed load and random faults on a real cluster of a tiny model, in phases with a quiet point after each."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.cluster import Cluster
from tests.e2e.soak import quiet
from tests.e2e.soak.callers import Caller, Tally, answer_of
from tests.e2e.soak.faults import Hand
from tests.e2e.soak.holdings import Holdings
from tests.e2e.soak.outages import Outages
from tests.e2e.soak.questions import WRONG, Answer, Question, draw
from tests.e2e.soak.shared import SharedStreams
from tests.e2e.tiny import tiny_cluster
from twostroke import Client, InvalidArgument

QUESTIONS = 30
CALLERS = 8
LONGEST_PHASE_SECONDS = 60.0
# Of the run: what parts hold after it is what they may hold at the end.
WARM_UP_SHARE = 20  # percent

# Pools with less room than all callers want, so that sequences are preempted; a queue that is full at times; prompts
# computed on both sides.
WORKER_FLAGS = {"num-blocks": 160, "host-cache-gib": 0.01}
PREFILL_FLAGS = {"max-batch-tokens": 128}
DECODE_FLAGS = {"prefill-tokens": 24, "num-blocks": 96, "draft-tokens": 3}
ROUTER_FLAGS = {"headroom-tokens": 1, "max-queue": 6}


@dataclass(frozen=True)
class QuietPoint:
    seconds: float  # since the faults began
    requests: int  # so far
    holdings: dict[str, Holdings]


@dataclass
class Report:
    tally: Tally = field(default_factory=Tally)
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)  # by part and fault
    quiet_points: list[QuietPoint] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def soak(directory: Path, seconds: float, seed: int, say: Callable[[str], None] = lambda _: None) -> Report:
    """Runs for about so long. Everything but the clock is drawn from `seed`. Logs go to `directory`.

    Raises:
        AssertionError: the cluster did not start, or a wrong request was answered in peace.
    """
    report = Report()
    rng = random.Random(seed)
    questions = [draw(rng) for _ in range(QUESTIONS)]
    with (
        ExitStack() as stack,
        tiny_cluster(
            directory / "model",
            worker_flags=WORKER_FLAGS,
            prefill=2,
            decode=2,
            routers=2,
            prefill_flags=PREFILL_FLAGS,
            decode_flags=DECODE_FLAGS,
            router_flags=ROUTER_FLAGS,
            metrics=True,
            log=directory / "parts.log",
        ) as cluster,
    ):
        references = _ask_in_peace(cluster, questions)
        outages = Outages()
        shared = [stack.enter_context(SharedStreams(target)) for target in cluster.targets]
        by_threads = [stack.enter_context(Client(target, share_call=True)) for target in cluster.targets]
        callers = _callers(cluster, shared, by_threads, references, outages, report.tally, seed)
        hands = _hands(cluster, outages, seed)
        began = time.monotonic()
        phases = max(2, round(seconds / LONGEST_PHASE_SECONDS))
        for phase in range(1, phases + 1):
            _work([*callers, *hands], seconds / phases)
            _settle(cluster, f"at quiet point {phase}", report)
            left = quiet.segments_left(cluster, {name for hand in hands for name in hand.segments})
            report.problems += [f"at quiet point {phase}: {name} is still there" for name in left]
            point = QuietPoint(time.monotonic() - began, report.tally.counts.total(), quiet.holdings(cluster))
            report.quiet_points.append(point)
            problems = [*report.tally.problems, *report.problems]
            count = f"{point.seconds:.0f} s, {point.requests} requests, {len(problems)} problems"
            say(f"quiet point {phase}/{phases}: {count}{'' if not problems else '; the last: ' + problems[-1]}")
        if _ask_in_peace(cluster, questions) != references:
            report.problems.append("what is answered in peace is not what it was at the beginning")
        _settle(cluster, "at the end", report)
    warm, last = report.quiet_points[WARM_UP_SHARE * phases // 100], report.quiet_points[-1]
    report.problems += quiet.grown(last.holdings, warm.holdings)
    for hand in hands:
        report.faults += hand.counts
        report.problems += hand.problems
    report.problems += report.tally.problems
    return report


def _settle(cluster: Cluster, where: str, report: Report) -> None:
    """What is held at a quiet point is a problem, and the run goes on: what follows may show what it was."""
    try:
        quiet.settle(cluster)
    except AssertionError as error:
        report.problems.append(f"{where}: {error}")


def _ask_in_peace(cluster: Cluster, questions: Sequence[Question]) -> dict[Question, Answer]:
    for prompt, options in WRONG:
        try:
            cluster.client.generate(prompt, **options)
        except InvalidArgument:
            continue
        raise AssertionError(f"a wrong request was answered: {len(prompt)} tokens, {options}")
    return {question: answer_of(cluster.client.generate(question.prompt, **question.options)) for question in questions}


def _callers(
    cluster: Cluster,
    shared: Sequence[SharedStreams],
    by_threads: Sequence[Client],
    references: Mapping[Question, Answer],
    outages: Outages,
    tally: Tally,
    seed: int,
) -> list[Caller]:
    names = [f"router-{index}" for index in range(len(cluster.clients))]
    clients, in_threads = (dict(zip(names, those, strict=True)) for those in (cluster.clients, by_threads))
    streams = dict(zip(names, shared, strict=True))
    return [
        Caller(clients, streams, in_threads, references, outages, tally, random.Random(f"{seed} caller {serial}"))
        for serial in range(CALLERS)
    ]


def _hands(cluster: Cluster, outages: Outages, seed: int) -> list[Hand]:
    """One does everything to the first part of each kind. The other only stops the second ones, which therefore live
    from beginning to end: what they hold can be followed."""
    restarted, kept = ([f"{kind}-{index}" for kind in ("router", "prefill", "decode")] for index in (0, 1))
    rngs = [random.Random(f"{seed} hand {index}") for index in (0, 1)]
    return [
        Hand(cluster, restarted, ("kill", "drain", "stop"), (0.5, 3.0), outages, rngs[0]),
        Hand(cluster, kept, ("stop",), (2.0, 8.0), outages, rngs[1]),
    ]


def _work(workers: Sequence[Caller | Hand], seconds: float) -> None:
    over = threading.Event()
    with ThreadPoolExecutor(len(workers)) as pool:
        running = [pool.submit(worker.run, over) for worker in workers]
        time.sleep(seconds)
        over.set()
        for work in running:
            work.result()
