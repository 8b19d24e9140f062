"""Workers that keep failing are left alone for a while, and tried again with one request."""

import asyncio
import time
from pathlib import Path

import pytest

from router.cluster import circuit
from router.cluster.circuit import FAILURES, FIRST_PAUSE, LONGEST_PAUSE, Circuit
from router.dispatch import blame
from tests.router.cluster import Cluster, cluster, eventually, expected, request
from tests.router.fake_worker import DECODE, PREFILL, Ended, FakeWorker, Script

ALWAYS = 10**9


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Ahead:
    """The time, and `seconds` more."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(circuit, "time", made)
    return made


def is_paused(it: Circuit) -> bool:
    """Asked anew each time: mypy takes a property to stay as it was found."""
    return it.paused


def opened() -> Circuit:
    made = Circuit()
    for attempt in range(FAILURES):
        made.begin(attempt)
        made.failed((attempt,))
        made.ended(attempt)
    assert made.paused
    return made


# ---------------------------------------------------------------- the circuit alone


def test_it_opens_after_failures_in_a_row_only(clock: Clock) -> None:
    it = Circuit()
    for attempt in range(10 * FAILURES):
        it.begin(attempt)
        if attempt % FAILURES == FAILURES - 1:
            it.succeeded(attempt)
        else:
            assert it.failed((attempt,)) == 0
        assert not it.paused
    assert it.failed((1000,)) == 0
    assert it.failed((1001,)) == 0
    assert it.failed((1002,)) == FIRST_PAUSE
    assert it.paused


def test_a_worker_that_is_lost_with_many_attempts_failed_once(clock: Clock) -> None:
    it = Circuit()
    for attempt in range(50):
        it.begin(attempt)
    it.failed(range(50))
    for attempt in range(50):
        it.ended(attempt)
    assert not it.paused


def test_after_the_pause_one_attempt_is_the_probe(clock: Clock) -> None:
    it = opened()
    clock.now += FIRST_PAUSE - 0.01
    assert is_paused(it)
    clock.now += 0.02
    assert not is_paused(it)
    it.begin(7)
    assert is_paused(it)
    assert it.succeeded(7)
    assert not is_paused(it)
    assert it.failed((8,)) == 0  # and it is as good as new
    assert not it.paused


def test_pauses_grow_up_to_a_limit(clock: Clock) -> None:
    it = opened()
    pauses = []
    for attempt in range(10, 20):
        clock.now += LONGEST_PAUSE
        it.begin(attempt)
        pauses.append(it.failed((attempt,)))
        it.ended(attempt)
    assert pauses[:3] == [2 * FIRST_PAUSE, 4 * FIRST_PAUSE, 8 * FIRST_PAUSE]
    assert pauses[-1] == LONGEST_PAUSE


def test_a_probe_that_says_nothing_makes_room_for_another(clock: Clock) -> None:
    it = opened()
    clock.now += FIRST_PAUSE
    it.begin(7)
    it.ended(7)
    assert not it.paused
    it.begin(8)
    assert it.paused


def test_what_began_before_says_nothing_of_an_open_circuit(clock: Clock) -> None:
    it = Circuit()
    it.begin(1)
    it.begin(2)
    for attempt in range(10, 10 + FAILURES):
        it.failed((attempt,))
    assert it.failed((1,)) == 0
    assert not it.succeeded(2)
    assert it.paused
    clock.now += FIRST_PAUSE
    it.begin(20)
    assert not it.succeeded(2)
    assert it.failed((1,)) == 0
    assert it.paused


# ---------------------------------------------------------------- in a router


def paused(it: Cluster, role: str) -> float | None:
    return it.router.metrics.registry.get_sample_value("twostroke_workers_paused", {"role": role})


async def ask(it: Cluster, times: int = 1) -> None:
    for answer in await asyncio.gather(*(it.generate() for _ in range(times))):
        assert list(answer.choices[0].token_ids) == expected(8)


def bad_and_good(script: Script) -> list[Script | FakeWorker]:
    """Decode workers; the bad one has more room, so that it is always the first choice."""
    return [FakeWorker(DECODE, script, num_blocks=8192), FakeWorker(DECODE)]


async def test_a_decode_worker_that_keeps_failing_is_left_alone_and_tried_again(model: Path, clock: Clock) -> None:
    script = Script(fail=ALWAYS)
    async with cluster(model, decodes=bad_and_good(script)) as it:
        bad, good = it.decodes
        for _ in range(FAILURES):
            assert paused(it, "decode") == 0
            await ask(it)
        assert len(bad.reserves) == FAILURES
        assert paused(it, "decode") == 1
        for _ in range(5):
            await ask(it)
        assert len(bad.reserves) == FAILURES
        clock.now += FIRST_PAUSE
        assert paused(it, "decode") == 0
        await ask(it, times=8)
        assert len(bad.reserves) == FAILURES + 1  # the probe, which failed: now the pause is twice as long
        clock.now += 1.9 * FIRST_PAUSE
        assert paused(it, "decode") == 1
        script.fail = 0
        clock.now += 0.1 * FIRST_PAUSE
        assert paused(it, "decode") == 0
        before = len(good.reserves)
        for _ in range(4):
            await ask(it)
        assert len(good.reserves) == before
        assert len(bad.starts) == 4


async def test_a_probe_need_not_come_to_its_end(model: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may take minutes; for as long as the pause took is enough."""
    monkeypatch.setattr(circuit, "FIRST_PAUSE", 1000.0)  # longer than the test
    of_probes = Ahead()
    monkeypatch.setattr(blame, "time", of_probes)
    async with cluster(model, decodes=bad_and_good(Script(fail=FAILURES, step_seconds=0.005))) as it:
        for _ in range(FAILURES):
            await ask(it)
        clock.now += 1000
        assert paused(it, "decode") == 0
        probe = it.stub.GenerateStream(request(max_tokens=2000))
        await eventually(lambda: bool(it.decodes[0].running))
        assert paused(it, "decode") == 1
        of_probes.seconds = 1000
        await eventually(lambda: paused(it, "decode") == 0)
        assert it.decodes[0].running
        await ask(it)
        assert len(it.decodes[0].reserves) == FAILURES + 2
        probe.cancel()


@pytest.mark.usefixtures("clock")
async def test_a_prefill_worker_that_keeps_failing_is_left_alone(model: Path) -> None:
    bad = FakeWorker(PREFILL, Script(fail=ALWAYS))
    async with cluster(model, prefills=[bad]) as it:
        good = FakeWorker(PREFILL)
        it.prefills.append(good)
        it.router.registry._keep_link((await good.start(), PREFILL))
        await eventually(it.introduced)
        for _ in range(FAILURES + 5):
            await ask(it)
        assert len(bad.prefills) == FAILURES
        assert len(good.prefills) == FAILURES + 5
        assert paused(it, "prefill") == 1


@pytest.mark.usefixtures("clock")
async def test_a_prefill_worker_whose_kv_nobody_can_read_is_left_alone(model: Path) -> None:
    """The decode workers say so, and it could be their own fault as well; but with another one they do well."""
    unreadable = FakeWorker(PREFILL)
    script = Script(fails_to_pull_from=unreadable.instance)
    async with cluster(model, prefills=[unreadable], decodes=[script, script]) as it:
        readable = FakeWorker(PREFILL)
        it.prefills.append(readable)
        it.router.registry._keep_link((await readable.start(), PREFILL))
        await eventually(it.introduced)
        resumes = [(await it.generate()).choices[0].finish.usage.resumes for _ in range(8)]
        assert sum(resumes) == FAILURES
        assert (paused(it, "prefill"), paused(it, "decode")) == (1, 0)


@pytest.mark.usefixtures("clock")
async def test_a_worker_that_breaks_off_again_and_again_is_left_alone(model: Path) -> None:
    """Also where every start makes a new instance of it, and the stream is a new one."""
    async with cluster(model, decodes=bad_and_good(Script(stop_after=3)), worker_grace=5) as it:
        for _ in range(FAILURES):
            dying = it.decodes[0]
            answer = asyncio.ensure_future(it.generate())
            await eventually(lambda: any(running.steps == 3 for running in it.decodes[0].running.values()))
            await dying.die()
            assert list((await answer).choices[0].token_ids) == expected(8)
            it.decodes[0] = FakeWorker(DECODE, Script(stop_after=3), num_blocks=8192)
            await it.decodes[0].start(dying.address)
            await eventually(it.introduced)
        assert paused(it, "decode") == 1
        for _ in range(5):
            await ask(it)
        assert not it.decodes[0].reserves


async def test_a_worker_that_goes_without_work_has_not_failed(model: Path) -> None:
    async with cluster(model, decodes=bad_and_good(Script())) as it:
        for _ in range(FAILURES + 1):
            idle = it.decodes[0]
            await idle.die()
            await eventually(lambda: len(it.router.dispatcher.workers.all()) == 2)
            it.decodes[0] = FakeWorker(DECODE, num_blocks=8192)
            await it.decodes[0].start(idle.address)
            await eventually(it.introduced)
        assert paused(it, "decode") == 0


@pytest.mark.parametrize(
    "script",
    [
        Script(refuse=3 * FAILURES),
        Script(lose_lease=3 * FAILURES),
        Script(end_after={2: [Ended.CAUSE_PREEMPTED] * 3 * FAILURES}),
    ],
    ids=["no room", "lost leases", "preempted"],
)
async def test_what_is_not_the_workers_fault_is_not_held_against_it(model: Path, script: Script) -> None:
    async with cluster(model, decodes=bad_and_good(script)) as it:
        while script.refuse or script.lose_lease or any(script.end_after.values()):
            await ask(it)
            assert paused(it, "decode") == 0


@pytest.mark.usefixtures("clock")  # it stands: no pause ends
async def test_the_only_worker_is_tried_on(model: Path) -> None:
    fails = Script(end_after={3: [Ended.CAUSE_FAILED] * 2 * FAILURES})
    async with cluster(model, decodes=[fails], max_resumes=2 * FAILURES) as it:
        choice = (await it.generate(max_tokens=40)).choices[0]
        assert list(choice.token_ids) == expected(40)
        assert choice.finish.usage.resumes == 2 * FAILURES
        assert paused(it, "decode") == 1
        await ask(it)


async def test_an_answer_that_the_caller_ends_was_well_done(model: Path) -> None:
    """As at a stop string: the router ends it, and hears nothing more of it from the worker."""
    script = Script(step_seconds=0.001)
    async with cluster(model, decodes=bad_and_good(script)) as it:
        for _ in range(3):
            script.fail = FAILURES - 1
            for _ in range(FAILURES - 1):
                await ask(it)
            call = it.stub.GenerateStream(request(max_tokens=1000))
            await eventually(lambda: any(running.steps > 3 for running in it.decodes[0].running.values()))
            call.cancel()
            await eventually(it.nothing_held)
            assert paused(it, "decode") == 0
