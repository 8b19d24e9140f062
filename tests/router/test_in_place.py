"""Decode workers that prefill, too: when they are asked to, what comes of it, and what may go wrong meanwhile."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from common.kv.prefix_hash import block_hashes, cache_root
from router.cluster.prefix_index import PrefixIndex
from router.dispatch import choose
from router.dispatch.request import Request
from tests import health
from tests.router.cluster import PROMPT, Cluster, cluster, eventually, expected, request
from tests.router.fake_worker import DECODE, PREFILL, Ended, FakeWorker, Script
from tests.router.models import EOS
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import worker_pb2

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def both(script: Script | None = None, prefill_tokens: int = 1, **hello: Any) -> FakeWorker:
    return FakeWorker(DECODE, script, prefill_tokens=prefill_tokens, **hello)


async def failing(it: Cluster, **fields: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await it.generate(**fields)
    return failed.value


# ---------------------------------------------------------------- who prefills


@pytest.mark.parametrize(("prefill_tokens", "in_place"), [(len(PROMPT), True), (len(PROMPT) - 1, False), (0, False)])
async def test_the_threshold_decides_while_there_is_a_prefill_worker(
    model: Path, prefill_tokens: int, in_place: bool
) -> None:
    async with cluster(model, decodes=[both(prefill_tokens=prefill_tokens)]) as it:
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert [reserve.prefill for reserve in it.decodes[0].reserves] == [in_place]
        assert len(it.prefills[0].prefills) == len(it.decodes[0].starts) == (not in_place)


async def test_what_the_decode_worker_has_cached_does_not_count(model: Path) -> None:
    prompt = tuple(range(40, 80))
    hashes = block_hashes(cache_root("f" * 32, ""), prompt, 16)
    async with cluster(model, decodes=[both(prefill_tokens=8)]) as it:
        await it.generate(prompt=prompt)
        it.decodes[0].send(cache=worker_pb2.CacheChanges(published=b"".join(hashes)))
        worker = it.router.dispatcher.workers.all()[0]
        await eventually(lambda: len(worker.cache) == 2)
        assert list((await it.generate(prompt=prompt)).choices[0].token_ids) == expected(8, prompt)
        assert [reserve.prefill for reserve in it.decodes[0].reserves] == [False, True]


async def test_what_a_prefill_worker_still_computes_does_not_count(model: Path) -> None:
    """Else the decode worker would find, when the prompt's turn comes, that it has to compute all of it."""
    prompts = [(*range(40, 88), token) for token in range(40, 44)]
    go_on = asyncio.Event()
    slow = Script(prefill_when=go_on)
    async with cluster(model, prefills=[slow], decodes=[both(prefill_tokens=8, prefill_overflow_tokens=8)]) as it:
        answers = [asyncio.ensure_future(it.generate(prompt=prompt)) for prompt in prompts]
        await eventually(lambda: len(it.prefills[0].held) == 4)
        go_on.set()
        for prompt, answer in zip(prompts, answers, strict=True):
            assert list((await answer).choices[0].token_ids) == expected(8, prompt)
        assert [reserve.prefill for reserve in it.decodes[0].reserves] == [False] * 4


async def test_what_the_decode_worker_computes_for_a_prompt_before_counts(model: Path) -> None:
    first = tuple(range(40, 88))
    second = first + (40,) * 8
    go_on = asyncio.Event()
    async with cluster(model, decodes=[both(Script(prefill_when=go_on), prefill_tokens=len(first))]) as it:
        asked = asyncio.ensure_future(it.generate(prompt=first))
        await eventually(lambda: len(it.decodes[0].held) == 1)
        answer = asyncio.ensure_future(it.generate(prompt=second))
        await eventually(lambda: len(it.decodes[0].held) == 2)
        worker = next(worker for worker in it.router.dispatcher.workers.all() if worker.role == DECODE)
        assert worker.pending_tokens == len(second)
        go_on.set()
        await asyncio.gather(asked, answer)
        assert [reserve.prefill for reserve in it.decodes[0].reserves] == [True, True]


async def test_a_single_token_is_not_worth_a_place_in_the_batch(model: Path) -> None:
    async with cluster(model, decodes=[both(prefill_tokens=1000)]) as it:
        assert list((await it.generate(max_tokens=1)).choices[0].token_ids) == expected(1)
        assert not it.decodes[0].reserves


async def test_without_a_prefill_worker_every_length_is_prefilled_in_place(model: Path) -> None:
    long = tuple(40 + place % 50 for place in range(1000))
    async with cluster(model, prefills=[], decodes=[both()]) as it:
        assert await health.check(it.channel) == SERVING
        for prompt in (PROMPT, long):
            assert list((await it.generate(prompt=prompt)).choices[0].token_ids) == expected(8, prompt)
        assert [reserve.prefill for reserve in it.decodes[0].reserves] == [True, True]


async def test_without_a_prefill_worker_those_that_only_decode_are_left_out(model: Path) -> None:
    async with cluster(model, prefills=[], decodes=[Script(), both(Script(refuse=1), num_blocks=130)]) as it:
        for _ in range(3):
            assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert [len(worker.reserves) for worker in it.decodes] == [0, 4]


async def test_workers_that_only_decode_are_no_cluster(model: Path) -> None:
    async with cluster(model, prefills=[], decodes=[Script()], worker_grace=0.05) as it:
        assert await health.check(it.channel) == NOT_SERVING
        await asyncio.sleep(0.1)
        error = await failing(it)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert error.details() == "no prefill worker is connected; it is safe to try again"


def long_prompts(count: int) -> list[tuple[int, ...]]:
    return [tuple(40 + (start + place) % 50 for place in range(60)) for start in range(count)]


async def test_prompts_that_wait_to_be_computed_send_others_elsewhere(model: Path) -> None:
    go_on = asyncio.Event()
    slow = Script(prefill_when=go_on)
    async with cluster(model, prefills=[], decodes=[both(slow), both(num_blocks=4090)]) as it:
        emptier, other = it.decodes
        first = asyncio.ensure_future(it.generate(prompt=long_prompts(1)[0]))
        await eventually(lambda: len(emptier.held) == 1)
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        go_on.set()
        assert list((await first).choices[0].token_ids) == expected(8, long_prompts(1)[0])
        assert (len(emptier.reserves), len(other.reserves)) == (1, 1)
        assert [worker.pending_tokens for worker in it.router.dispatcher.workers.all()] == [0, 0]
        await it.generate()
        assert len(emptier.reserves) == 2, "nothing waits there any more"


@pytest.mark.parametrize("script", [Script(refuse=1), Script(fail=1), Script(end_after={3: [Ended.CAUSE_PREEMPTED]})])
async def test_what_is_to_be_computed_is_counted_out_however_it_ends(model: Path, script: Script) -> None:
    async with cluster(model, prefills=[], decodes=[both(script)]) as it:
        assert list((await it.generate(max_tokens=20)).choices[0].token_ids) == expected(20)
        assert it.router.dispatcher.workers.all()[0].pending_tokens == 0


async def test_short_prompts_pass_those_that_wait_for_a_prefill_worker(model: Path) -> None:
    long = long_prompts(3)
    go_on = asyncio.Event()
    slow = FakeWorker(PREFILL, Script(prefill_when=go_on), max_batch=50)
    async with cluster(model, prefills=[slow], decodes=[both(prefill_tokens=20)]) as it:
        answers = [asyncio.ensure_future(it.generate(prompt=prompt)) for prompt in long]
        await eventually(lambda: it.router.dispatcher.queued == 1)
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert it.router.dispatcher.queued == 1, "the long one waits on"
        go_on.set()
        for prompt, answer in zip(long, answers, strict=True):
            assert list((await answer).choices[0].token_ids) == expected(8, prompt)
        assert [reserve.prefill for reserve in it.decodes[0].reserves] == [False, False, True, False]


async def test_a_decode_worker_helps_out_with_one_prompt_at_a_time(model: Path) -> None:
    prompts = long_prompts(5)
    slow = FakeWorker(PREFILL, Script(silent=True), max_batch=50)
    go_on = asyncio.Event()
    helping = FakeWorker(DECODE, Script(prefill_when=go_on), prefill_overflow_tokens=len(prompts[0]))
    async with cluster(model, prefills=[slow], decodes=[helping]) as it:
        calls = [it.stub.Generate(request(prompt=prompt), timeout=10) for prompt in prompts[:2]]
        await eventually(lambda: len(slow.prefills) == 2)
        answers = [asyncio.ensure_future(it.generate(prompt=prompt)) for prompt in prompts[2:]]
        await eventually(lambda: it.router.dispatcher.queued == 2)
        go_on.set()
        for prompt, answer in zip(prompts[2:], answers, strict=True):
            assert list((await answer).choices[0].token_ids) == expected(8, prompt)
        assert [reserve.prefill for reserve in helping.reserves] == [False, False, True, True, True]
        assert len(slow.prefills) == 2
        for call in calls:
            call.cancel()
        await eventually(it.nothing_held)


async def test_it_helps_out_with_what_has_waited_long_enough(model: Path) -> None:
    prompts = long_prompts(3)
    slow = FakeWorker(PREFILL, Script(silent=True), max_batch=50)
    helping = FakeWorker(DECODE, prefill_overflow_tokens=len(prompts[0]), prefill_overflow_seconds=0.3)
    async with cluster(model, prefills=[slow], decodes=[helping]) as it:
        calls = [it.stub.Generate(request(prompt=prompt), timeout=10) for prompt in prompts[:2]]
        await eventually(lambda: len(slow.prefills) == 2)
        began = time.monotonic()
        assert list((await it.generate(prompt=prompts[2])).choices[0].token_ids) == expected(8, prompts[2])
        assert time.monotonic() - began >= 0.3
        assert [reserve.prefill for reserve in helping.reserves] == [False, False, True]
        for call in calls:
            call.cancel()
        await eventually(it.nothing_held)


async def test_an_answer_that_has_begun_does_not_wait_for_help(model: Path) -> None:
    first, *others = long_prompts(3)
    idle = asyncio.Event()
    idle.set()
    slow = FakeWorker(PREFILL, Script(prefill_when=idle), max_batch=50)
    preempts = Script(step_seconds=0.05, end_after={6: [worker_pb2.Ended.CAUSE_PREEMPTED]})
    helping = FakeWorker(DECODE, preempts, prefill_overflow_tokens=100, prefill_overflow_seconds=60)
    async with cluster(model, prefills=[slow], decodes=[helping]) as it:
        answer = asyncio.ensure_future(it.generate(prompt=first))
        await eventually(lambda: len(helping.running) == 1)
        idle.clear()
        waiting = [asyncio.ensure_future(it.generate(prompt=prompt)) for prompt in others]
        assert list((await answer).choices[0].token_ids) == expected(8, first)
        assert [reserve.prefill for reserve in helping.reserves] == [False, False, False, True]
        idle.set()
        for prompt, late in zip(others, waiting, strict=True):
            assert list((await late).choices[0].token_ids) == expected(8, prompt)


@pytest.mark.parametrize("allowed", ["prefill_tokens", "prefill_overflow_tokens"])
async def test_a_single_token_is_computed_by_a_decode_worker_while_all_prefill_workers_are_busy(
    model: Path, allowed: str
) -> None:
    prompts = long_prompts(3)
    slow = FakeWorker(PREFILL, Script(silent=True), max_batch=50)
    hello: dict[str, Any] = {allowed: len(PROMPT)}
    helping = FakeWorker(DECODE, **hello)
    async with cluster(model, prefills=[slow], decodes=[helping]) as it:
        calls = [it.stub.Generate(request(prompt=prompt, max_tokens=1), timeout=10) for prompt in prompts]
        await eventually(lambda: it.router.dispatcher.queued == 1)
        assert list((await it.generate(max_tokens=1)).choices[0].token_ids) == expected(1)
        assert [reserve.prefill for reserve in helping.reserves] == [True]
        assert (len(slow.prefills), it.router.dispatcher.queued) == (2, 1), "the long one waits on"
        for call in calls:
            call.cancel()
        await eventually(it.nothing_held)


async def test_the_decode_worker_with_the_prefix_helps_out_whoever_has_more_room(model: Path) -> None:
    prompt = long_prompts(1)[0]
    slow = FakeWorker(PREFILL, Script(silent=True), max_batch=50)
    roomy, holder = (FakeWorker(DECODE, prefill_overflow_tokens=20, num_blocks=blocks) for blocks in (4096, 200))
    async with cluster(model, prefills=[slow], decodes=[roomy, holder]) as it:
        holder.send(
            cache=worker_pb2.CacheChanges(published=b"".join(block_hashes(cache_root("f" * 32, ""), prompt, 16)))
        )
        await eventually(lambda: any(worker.cache for worker in it.router.dispatcher.workers.all()))
        calls = [it.stub.Generate(request(prompt=(token, *prompt)), timeout=10) for token in (7, 8)]
        await eventually(lambda: not any(worker.accepts_prefill for worker in it.router.dispatcher.workers.of(PREFILL)))
        assert list((await it.generate(prompt=prompt)).choices[0].token_ids) == expected(8, prompt)
        assert [reserve.prefill for reserve in holder.reserves] == [True]
        for call in calls:
            call.cancel()
        await eventually(it.nothing_held)


async def test_prompts_that_wait_are_not_looked_up_again_and_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = FakeWorker(PREFILL, Script(silent=True), max_batch=50)
    async with cluster(model, prefills=[slow], decodes=[both(prefill_tokens=20) for _ in range(2)]) as it:
        calls = [it.stub.Generate(request(prompt=prompt), timeout=10) for prompt in long_prompts(20)]
        await eventually(lambda: it.router.dispatcher.queued == 18)
        for name in ("hits", "computed", "shared"):
            monkeypatch.delattr(PrefixIndex, name)
        it.router.dispatcher._placement.dispatch()
        monkeypatch.undo()
        for call in calls:
            call.cancel()
        await eventually(it.nothing_held)


async def test_what_workers_say_does_not_have_all_that_wait_looked_at_each_time(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at, pair = [], choose.pair

    def counted(request: Request, *rest: Any) -> choose.Pair | choose.Missing:
        looked_at.append(request)
        return pair(request, *rest)

    slow = FakeWorker(PREFILL, Script(silent=True), max_batch=50)
    async with cluster(model, prefills=[slow], decodes=[both(prefill_tokens=20) for _ in range(4)]) as it:
        calls = [it.stub.Generate(request(prompt=prompt), timeout=10) for prompt in long_prompts(42)]
        await eventually(lambda: it.router.dispatcher.queued == 40)
        monkeypatch.setattr(choose, "pair", counted)
        messages = 200
        for _ in range(messages):
            it.router.dispatcher._placement.dispatch()
        assert len(looked_at) < 10 * messages  # of 40 that wait
        assert list((await it.generate()).choices[0].token_ids) == expected(8)  # a short one, at their end
        for call in calls:
            call.cancel()
        await eventually(it.nothing_held)


async def test_what_is_too_long_for_it_waits_for_a_prefill_worker(model: Path) -> None:
    prompts = long_prompts(3)
    slow = FakeWorker(PREFILL, Script(prefill_seconds=0.1), max_batch=50)
    helping = FakeWorker(DECODE, prefill_overflow_tokens=len(prompts[0]) - 1)
    async with cluster(model, prefills=[slow], decodes=[helping]) as it:
        answers = await asyncio.gather(*(it.generate(prompt=prompt) for prompt in prompts))
        assert [list(answer.choices[0].token_ids) for answer in answers] == [expected(8, prompt) for prompt in prompts]
        assert len(slow.prefills) == 3


async def test_who_only_helps_out_prefills_all_while_there_is_no_prefill_worker(model: Path) -> None:
    async with cluster(model, prefills=[], decodes=[FakeWorker(DECODE, prefill_overflow_tokens=1)]) as it:
        assert await health.check(it.channel) == SERVING
        assert list((await it.generate()).choices[0].token_ids) == expected(8)


async def test_no_prompt_passes_one_that_waits_for_room(model: Path) -> None:
    """The first holds six of eight blocks; the long one wants five, the short one two."""
    worker = both(Script(step_seconds=0.01), prefill_tokens=20, num_blocks=8, max_length=128)
    async with cluster(model, decodes=[worker]) as it:
        running = asyncio.ensure_future(it.generate(prompt=long_prompts(1)[0][:50], max_tokens=40))
        await eventually(lambda: len(worker.running) == 1)
        long = asyncio.ensure_future(it.generate(prompt=long_prompts(2)[1]))
        await eventually(lambda: it.router.dispatcher.queued == 1)
        short = asyncio.ensure_future(it.generate())
        for answer in (running, long, short):
            await answer
        assert [len(reserve.sequence.token_ids) for reserve in worker.reserves] == [50, 60, len(PROMPT)]


async def test_prompts_that_no_prefill_worker_has_taken_may_leave_from_anywhere(model: Path) -> None:
    slow = FakeWorker(PREFILL, Script(silent=True), max_batch=50)
    async with cluster(model, prefills=[slow], decodes=[both(prefill_tokens=20)]) as it:
        calls = [it.stub.Generate(request(prompt=prompt), timeout=10) for prompt in long_prompts(6)]
        await eventually(lambda: it.router.dispatcher.queued == 4)
        for left, place in enumerate((4, 2, 5, 3)):
            calls[place].cancel()
            await eventually(lambda left=left: it.router.dispatcher.queued == 3 - left)  # type: ignore[misc]
            assert list((await it.generate()).choices[0].token_ids) == expected(8)
        for call in calls:
            call.cancel()
        await eventually(it.nothing_held)


# ---------------------------------------------------------------- the answer


async def test_the_whole_answer(model: Path) -> None:
    async with cluster(model, prefills=[], decodes=[both(Script(prefill_seconds=0.02, step_seconds=0.001))]) as it:
        choice = (await it.generate(response=pb.ResponseOptions(logprobs=2))).choices[0]
        assert list(choice.token_ids) == [logprob.token_id for logprob in choice.logprobs] == expected(8)
        assert choice.finish.reason == pb.FINISH_REASON_LENGTH
        usage, timing = choice.finish.usage, choice.finish.timing
        assert (usage.prefill_cached_tokens, usage.decode_cached_tokens, usage.resumes) == (0, 6, 0)
        assert timing.transfer_ms == 0
        assert 0 < timing.reserved_ms < timing.prefill_ms
        assert 20 <= timing.prefill_ms <= timing.first_token_ms <= timing.total_ms
        assert 0 < timing.decode_ms <= timing.total_ms - timing.prefill_ms


@pytest.mark.parametrize(("max_tokens", "token"), [(1, 41), (50, EOS)])
async def test_the_first_token_may_be_the_last(model: Path, max_tokens: int, token: int) -> None:
    async with cluster(model, prefills=[], decodes=[both(Script(token=lambda _: token))]) as it:
        choice = (await it.generate(max_tokens=max_tokens)).choices[0]
        assert list(choice.token_ids) == [token]
        assert choice.finish.usage.decode_cached_tokens == 6
        assert choice.finish.usage.resumes == 0


# ---------------------------------------------------------------- what goes wrong

STATES = {
    "reserve": Script(silent=True),
    "prefill": Script(silent_at_prefill=True),
    "decode": Script(stop_after=3),
    "queue": Script(refuse=10**9),
}


def stuck(worker: FakeWorker, state: str) -> bool:
    match state:
        case "decode":
            return any(running.steps == 3 for running in worker.running.values())
        case "queue":
            return len(worker.reserves) > 0
        case _:
            return len(worker.held) == 1


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_client_that_goes_frees_the_worker(model: Path, state: str, how: str) -> None:
    async with cluster(model, prefills=[], decodes=[both(STATES[state])]) as it:
        call = it.stub.Generate(request(max_tokens=100), timeout=1 if how == "deadline" else 10)
        await eventually(lambda: stuck(it.decodes[0], state))
        if how == "cancel":
            call.cancel()
        with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
            await call
        await eventually(it.nothing_held)


@pytest.mark.parametrize("state", [state for state in STATES if state != "queue"])
async def test_its_death_is_survived_on_another(model: Path, state: str) -> None:
    async with cluster(model, prefills=[], decodes=[both(STATES[state])], worker_grace=5) as it:
        answer = asyncio.ensure_future(it.generate(max_tokens=20))
        await eventually(lambda: stuck(it.decodes[0], state))
        await it.decodes[0].die()
        await eventually(lambda: not it.router.dispatcher.workers.ready)
        assert await health.check(it.channel) == NOT_SERVING
        spare = both()
        it.decodes.append(spare)
        it.router.registry._keep_link((await spare.start(), DECODE))
        choice = (await answer).choices[0]
        assert list(choice.token_ids) == expected(20)
        assert choice.finish.usage.resumes == 1
        assert await health.check(it.channel) == SERVING


@pytest.mark.parametrize("state", STATES)
async def test_with_no_worker_left_the_answer_is_unavailable_soon(model: Path, state: str) -> None:
    async with cluster(model, prefills=[], decodes=[both(STATES[state])]) as it:
        answer = asyncio.ensure_future(failing(it, max_tokens=20))
        await eventually(lambda: stuck(it.decodes[0], state))
        began = time.monotonic()
        await it.decodes[0].die()
        error = await answer
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert error.details() == "no decode worker is connected; it is safe to try again"
        assert 0.2 < time.monotonic() - began < 5


async def test_without_its_prefill_worker_a_request_goes_on_in_place(model: Path) -> None:
    async with cluster(model, prefills=[Script(silent=True)], decodes=[both()]) as it:
        answer = asyncio.ensure_future(it.generate())
        await eventually(lambda: len(it.prefills[0].held) == 1)
        await it.prefills[0].die()
        assert list((await answer).choices[0].token_ids) == expected(8)
        assert [reserve.prefill for reserve in it.decodes[0].reserves] == [False, True]
        assert it.router.dispatcher.workers.ready


async def test_a_prefill_worker_that_comes_takes_the_long_prompts(model: Path) -> None:
    async with cluster(model, prefills=[], decodes=[both(prefill_tokens=10)]) as it:
        await it.generate()
        it.prefills.append(late := FakeWorker(PREFILL))
        it.router.registry._keep_link((await late.start(), PREFILL))
        await eventually(lambda: it.router.dispatcher.workers.count(PREFILL) == 1)
        for prompt in (PROMPT, PROMPT[:10]):
            assert list((await it.generate(prompt=prompt)).choices[0].token_ids) == expected(8, prompt)
        assert [reserve.prefill for reserve in it.decodes[0].reserves] == [True, False, True]


@pytest.mark.parametrize(
    ("script", "resumes"),
    [
        (Script(fail=1), 1),
        (Script(refuse=2), 0),
        (Script(end_after={0: [Ended.CAUSE_PREEMPTED]}), 1),
        (Script(end_after={3: [Ended.CAUSE_PREEMPTED] * 5}), 5),
        (Script(end_after={3: [Ended.CAUSE_FAILED] * 3}), 3),
    ],
)
async def test_a_resumed_request_goes_on_where_it_was(model: Path, script: Script, resumes: int) -> None:
    async with cluster(model, prefills=[], decodes=[both(script)], headroom_tokens=4) as it:
        choice = (await it.generate(max_tokens=40)).choices[0]
        assert list(choice.token_ids) == expected(40)
        assert choice.finish.usage.resumes == resumes
        last = it.decodes[0].reserves[-1]
        assert last.prefill
        assert list(last.sequence.token_ids[len(PROMPT) :]) == expected(len(last.sequence.token_ids) - len(PROMPT))


async def test_a_request_that_only_decode_workers_can_hold_does_not_wait_for_ever(model: Path) -> None:
    async with cluster(model, prefills=[Script(silent=True)]) as it:
        answer = asyncio.ensure_future(failing(it, max_tokens=100))
        await eventually(lambda: len(it.prefills[0].held) == 1)
        it.decodes.append(small := both(max_length=48))
        it.router.registry._keep_link((await small.start(), DECODE))
        await eventually(lambda: it.router.dispatcher.workers.count(DECODE) == 2)
        await it.prefills[0].die()
        assert (await answer).details() == "no decode worker that is left can hold 120 tokens"


async def test_many_at_once_with_everything_going_wrong(model: Path) -> None:
    def bad() -> FakeWorker:
        ends = {2: [Ended.CAUSE_PREEMPTED] * 20, 5: [Ended.CAUSE_FAILED] * 10}
        return both(Script(refuse=10, end_after=ends), prefill_tokens=30)

    async with cluster(model, [Script(fail=3)], [bad(), bad()], max_resumes=50) as it:
        prompts: list[Sequence[int]] = [tuple(range(40, 41 + length % 60)) for length in range(100)]
        asked = [
            it.generate(prompt=prompt, max_tokens=30, cache_salt=str(place)) for place, prompt in enumerate(prompts)
        ]
        answers = await asyncio.gather(*asked)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert list(answer.choices[0].token_ids) == expected(30, prompt)
        assert {reserve.prefill for worker in it.decodes for reserve in worker.reserves} == {False, True}
