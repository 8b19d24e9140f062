"""Decode workers that prefill, too: when they are asked to, what comes of it, and what may go wrong meanwhile."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.prefix_hash import block_hashes, cache_root
from tests.router.cluster import PROMPT, Cluster, cluster, eventually, expected, request
from tests.router.fake_worker import DECODE, PREFILL, Ended, FakeWorker, Script
from tests.router.models import EOS
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import worker_pb2

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def both(script: Script | None = None, prefill_tokens: int = 1, **hello: Any) -> FakeWorker:
    return FakeWorker(DECODE, script, prefill_tokens=prefill_tokens, **hello)


async def health(it: Cluster) -> "health_pb2.HealthCheckResponse.ServingStatus.ValueType":
    return (await health_pb2_grpc.HealthStub(it.channel).Check(health_pb2.HealthCheckRequest())).status


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
        worker = it.router.dispatcher.workers()[0]
        await eventually(lambda: len(worker.cache) == 2)
        assert list((await it.generate(prompt=prompt)).choices[0].token_ids) == expected(8, prompt)
        assert [reserve.prefill for reserve in it.decodes[0].reserves] == [False, True]


async def test_a_single_token_is_not_worth_a_place_in_the_batch(model: Path) -> None:
    async with cluster(model, decodes=[both(prefill_tokens=1000)]) as it:
        assert list((await it.generate(max_tokens=1)).choices[0].token_ids) == expected(1)
        assert not it.decodes[0].reserves


async def test_without_a_prefill_worker_every_length_is_prefilled_in_place(model: Path) -> None:
    long = tuple(40 + place % 50 for place in range(1000))
    async with cluster(model, prefills=[], decodes=[both()]) as it:
        assert await health(it) == SERVING
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
        assert await health(it) == NOT_SERVING
        await asyncio.sleep(0.1)
        error = await failing(it)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert error.details() == "no prefill worker is connected; it is safe to try again"


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
        call = it.stub.Generate(request(max_tokens=100), timeout=0.3 if how == "deadline" else 10)
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
        await eventually(lambda: not it.router.dispatcher.ready)
        assert await health(it) == NOT_SERVING
        spare = both()
        it.decodes.append(spare)
        it.router.registry._keep_link((await spare.start(), DECODE))
        choice = (await answer).choices[0]
        assert list(choice.token_ids) == expected(20)
        assert choice.finish.usage.resumes == 1
        assert await health(it) == SERVING


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
        assert 0.2 < time.monotonic() - began < 1.5


async def test_without_its_prefill_worker_a_request_goes_on_in_place(model: Path) -> None:
    async with cluster(model, prefills=[Script(silent=True)], decodes=[both()]) as it:
        answer = asyncio.ensure_future(it.generate())
        await eventually(lambda: len(it.prefills[0].held) == 1)
        await it.prefills[0].die()
        assert list((await answer).choices[0].token_ids) == expected(8)
        assert [reserve.prefill for reserve in it.decodes[0].reserves] == [False, True]
        assert it.router.dispatcher.ready


async def test_a_prefill_worker_that_comes_takes_the_long_prompts(model: Path) -> None:
    async with cluster(model, prefills=[], decodes=[both(prefill_tokens=10)]) as it:
        await it.generate()
        it.prefills.append(late := FakeWorker(PREFILL))
        it.router.registry._keep_link((await late.start(), PREFILL))
        await eventually(lambda: it.router.dispatcher.count(PREFILL) == 1)
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
        await eventually(lambda: it.router.dispatcher.count(DECODE) == 2)
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
