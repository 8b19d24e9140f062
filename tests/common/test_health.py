"""Watchers of one health service, each on its own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.network.health import Health

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@asynccontextmanager
async def watching(health: Health, service: str, watchers: int) -> AsyncIterator[list[Any]]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            yield [stub.Watch(health_pb2.HealthCheckRequest(service=service)) for _ in range(watchers)]
    finally:
        await server.stop(None)


async def read(call: Any) -> int:
    return int((await asyncio.wait_for(call.read(), 10)).status)


async def test_a_watcher_hears_of_changes_after_another_left() -> None:
    health = Health()
    await health.set("it", NOT_SERVING)
    async with watching(health, "it", 2) as (stays, leaves):
        assert [await read(stays), await read(leaves)] == [NOT_SERVING, NOT_SERVING]
        leaves.cancel()
        await asyncio.sleep(0.2)  # until the server has seen it
        await health.set("it", SERVING)
        assert await read(stays) == SERVING
        await health.set("it", NOT_SERVING)
        assert await read(stays) == NOT_SERVING


async def test_a_service_that_is_not_there_yet_and_the_end() -> None:
    health = Health()
    async with watching(health, "it", 1) as (watcher,):
        assert await read(watcher) == UNKNOWN
        await health.set("other", SERVING)  # no news of this one
        await health.set("it", SERVING)
        assert await read(watcher) == SERVING
        await health.enter_graceful_shutdown()
        assert await read(watcher) == NOT_SERVING
        assert await asyncio.wait_for(watcher.read(), 10) is grpc.aio.EOF, "a server that stops waits for its calls"
        await health.set("it", SERVING)  # which counts no more
        no_context: Any = None
        check = await health.Check(health_pb2.HealthCheckRequest(service="it"), no_context)
        assert check.status == NOT_SERVING


class SlowWatcher:
    """Is slow to take the first status; by then the server stops."""

    def __init__(self, health: Health) -> None:
        self.told: list[int] = []
        self._health = health

    async def write(self, response: health_pb2.HealthCheckResponse) -> None:
        self.told.append(response.status)
        if len(self.told) == 1:
            await self._health.enter_graceful_shutdown()


async def test_a_watcher_that_is_slow_hears_of_the_end() -> None:
    health = Health()
    await health.set("it", SERVING)
    watcher: Any = SlowWatcher(health)
    await asyncio.wait_for(health.Watch(health_pb2.HealthCheckRequest(service="it"), watcher), 10)
    assert watcher.told == [SERVING, NOT_SERVING]
