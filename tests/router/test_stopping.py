"""What callers are told when the router stops before their answers are complete."""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router import server
from router.cluster.worker import Worker
from router.dispatch.dispatcher import STOPPED
from router.dispatch.request import Attempt
from tests.router.cluster import Cluster, cluster, eventually, expected, request
from tests.router.fake_worker import DECODE, FakeWorker, Script
from twostroke.v1 import worker_pb2


def busy() -> FakeWorker:
    """A decode worker that runs one sequence, and does not end it."""
    return FakeWorker(DECODE, Script(stop_after=3), max_batch=1)


async def read_into(tokens: list[int], call: Any) -> None:
    async for chunk in call:
        tokens += chunk.delta.token_ids


def unavailable(it: Cluster, method: str) -> float:
    calls = it.router.metrics.registry
    return calls.get_sample_value("twostroke_calls_total", {"method": method, "code": "UNAVAILABLE"}) or 0


async def test_requests_that_outlast_the_drain_are_unavailable(model: Path) -> None:
    async with cluster(model, decodes=[busy()]) as it:
        running = it.stub.GenerateStream(request(max_tokens=100))
        await eventually(lambda: it.router.dispatcher.running == 1)
        tokens: list[int] = []
        reading = asyncio.create_task(read_into(tokens, running))
        await eventually(lambda: len(tokens) == 1 + 3)
        waiting = it.stub.Generate(request(max_tokens=100))
        await eventually(lambda: it.router.dispatcher.queued == 1)
        stopping = asyncio.create_task(it.router.stop(0.2))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await reading
        assert tokens == expected(1 + 3)
        assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.UNAVAILABLE, STOPPED)
        assert (await waiting.code(), await waiting.details()) == (grpc.StatusCode.UNAVAILABLE, STOPPED)
        async with asyncio.timeout(5):
            await stopping
        assert unavailable(it, "GenerateStream") == unavailable(it, "Generate") == 1


def hold_up(it: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a call does that reaches gRPC in the moment in which it stops."""
    stop = it.router._server.stop

    async def held_up(grace: float | None) -> None:
        if grace is not None:
            await asyncio.sleep(grace)
        await stop(grace)

    monkeypatch.setattr(it.router._server, "stop", held_up)


async def test_a_call_that_grpc_hands_to_nobody_does_not_hold_up_the_end(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LAST_WORDS_SECONDS", 0.1)
    async with cluster(model, decodes=[FakeWorker(DECODE, Script(step_seconds=0.02))]) as it:
        hold_up(it, monkeypatch)
        answer = asyncio.create_task(it.generate(max_tokens=20))
        await eventually(lambda: it.router.dispatcher.running == 1)
        async with asyncio.timeout(5):
            await it.router.stop(30)
        assert (await answer).choices[0].token_ids == expected(20)


async def test_a_call_whose_message_comes_while_the_router_stops_has_its_time(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LAST_WORDS_SECONDS", 0.1)
    async with cluster(model) as it:
        hold_up(it, monkeypatch)
        stopping = asyncio.create_task(it.router.stop(30))
        await asyncio.sleep(0.15)  # nothing was under way at the first look
        it.router.service.calls += 1
        await asyncio.sleep(0.3)
        assert not stopping.done()
        it.router.service.calls -= 1
        async with asyncio.timeout(5):
            await stopping


async def test_requests_that_end_within_the_drain_are_answered(model: Path) -> None:
    slow = Script(step_seconds=0.01)
    async with cluster(model, decodes=[slow]) as it:
        answer = asyncio.create_task(it.generate(max_tokens=20))
        await eventually(lambda: it.router.dispatcher.running == 1)
        async with asyncio.timeout(5):
            await it.router.stop(30)
        assert len((await answer).choices[0].token_ids) == 20


async def test_a_request_that_is_still_checked_when_the_router_stops_is_unavailable(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(model) as it:
        tokenizer, go_on = it.router.service._tokenizer, asyncio.Event()
        encode, asked = tokenizer.encode, asyncio.Event()

        async def slow(text: str, *, add_special_tokens: bool) -> list[int]:
            asked.set()
            await go_on.wait()
            return await encode(text, add_special_tokens=add_special_tokens)

        monkeypatch.setattr(tokenizer, "encode", slow)
        call = it.stub.Generate(request(text="hello"))
        await asked.wait()
        it.router.dispatcher.stop()
        go_on.set()
        assert (await call.code(), await call.details()) == (grpc.StatusCode.UNAVAILABLE, STOPPED)


async def test_an_answer_of_which_only_the_end_is_missing_is_whole(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(model) as it:
        dispatcher = it.router.dispatcher
        ended = dispatcher._ended

        def stopped(worker: Worker, attempt: Attempt, message: worker_pb2.Ended) -> None:
            dispatcher.stop()
            assert attempt.id not in worker.attempts
            monkeypatch.setattr(dispatcher, "_ended", ended)

        monkeypatch.setattr(dispatcher, "_ended", stopped)
        choice = (await it.generate(max_tokens=6)).choices[0]
        assert list(choice.token_ids) == expected(6)


async def test_a_fault_of_the_router_while_it_stops_costs_one_request(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(model, decodes=[Script(stop_after=3)]) as it:
        dispatcher = it.router.dispatcher
        calls = [it.stub.Generate(request(max_tokens=100)) for _ in range(3)]
        await eventually(lambda: dispatcher.running == 3)
        close, count = dispatcher._attempts.close, itertools.count()

        def faulty(attempt: Attempt, outcome: str, problem: str) -> None:
            assert next(count), "the first fails"
            close(attempt, outcome, problem)

        monkeypatch.setattr(dispatcher._attempts, "close", faulty)
        await it.router.stop(0)
        codes = sorted([(await call.code()).name for call in calls])
        assert codes == ["INTERNAL", "UNAVAILABLE", "UNAVAILABLE"]


async def test_an_idle_router_stops_at_once_though_its_health_is_watched(model: Path) -> None:
    async with cluster(model) as it:
        stub: Any = health_pb2_grpc.HealthStub(it.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        async with asyncio.timeout(20):
            await it.router.stop(60)
