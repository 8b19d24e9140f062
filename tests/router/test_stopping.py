"""What callers are told when the router stops before their answers are complete."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from router.dispatch.dispatcher import STOPPED
from tests.router.cluster import Cluster, cluster, eventually, expected, request
from tests.router.fake_worker import DECODE, FakeWorker, Script


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
        waiting = it.stub.Generate(request(max_tokens=100))
        await eventually(lambda: it.router.dispatcher.queued == 1)
        tokens: list[int] = []
        stopping = asyncio.create_task(it.router.stop(0.2))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await read_into(tokens, running)
        assert tokens == expected(1 + 3)
        assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.UNAVAILABLE, STOPPED)
        assert (await waiting.code(), await waiting.details()) == (grpc.StatusCode.UNAVAILABLE, STOPPED)
        async with asyncio.timeout(5):
            await stopping
        assert unavailable(it, "GenerateStream") == unavailable(it, "Generate") == 1


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
