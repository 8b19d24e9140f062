import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from common.network import arrival
from common.network.arrival import LATE, NO_MESSAGE, WRONG_MESSAGE, ArrivalInterceptor
from common.network.health import Health
from tests import health
from tests.raw_calls import DATA, END_HEADERS, HEADERS, PREFACE, SETTINGS, call, frame, headers
from tests.router.cluster import eventually

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECT = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"


@pytest.fixture
async def port() -> AsyncIterator[int]:
    server = grpc.aio.server(interceptors=[ArrivalInterceptor(reflection.SERVICE_NAME)])
    reflection.enable_server_reflection((reflection.SERVICE_NAME,), server)
    service = Health()
    await service.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield port
    await server.stop(0)


async def answer(port: int, sent: bytes) -> bytes:
    """What comes back, up to the status of the call."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        received = b""
        async with asyncio.timeout(5):
            while b"grpc-message" not in received:
                received += await reader.read(65536)
        return received
    finally:
        writer.close()


def begun(path: str, part: bytes) -> bytes:
    """A call with a part of its message."""
    block = headers(method="POST", scheme="http", path=path, authority="localhost")
    return PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, block) + frame(DATA, 0, 1, part)


@pytest.mark.parametrize("path", [CHECK, WATCH, REFLECT])
@pytest.mark.parametrize("part", [b"", b"\0", b"\0\0\x3f\xff\xff" + bytes(1000)], ids=["nothing", "a byte", "a part"])
async def test_a_call_whose_message_does_not_arrive_is_ended(
    port: int, path: str, part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival, "ARRIVAL_SECONDS", 0.1)
    assert LATE.encode() in await answer(port, begun(path, part))


@pytest.mark.parametrize("limit", ["MOST_LATE_OF_A_HOST", "MOST_LATE"])
async def test_few_calls_may_wait_for_messages_that_are_late(
    port: int, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(arrival, "LATE_SECONDS", 0.2)
    monkeypatch.setattr(arrival, limit, 3)
    for _ in range(2):  # places that were held are free again
        await begin_eight_of_which_three_may_be_late(port)


async def begin_eight_of_which_three_may_be_late(port: int) -> None:
    calls = [asyncio.ensure_future(answer(port, begun(CHECK, b"\0"))) for _ in range(8)]
    await eventually(lambda: sum(it.done() for it in calls) == 5)
    assert all(LATE.encode() in it.result() for it in calls if it.done())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await health.check(channel, timeout=5) == health_pb2.HealthCheckResponse.SERVING
    await asyncio.sleep(0.4)
    assert sum(it.done() for it in calls) == 5
    for it in calls:
        it.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize("path", [CHECK, WATCH, REFLECT])
async def test_what_is_no_message_is_told_so(port: int, path: str) -> None:
    assert WRONG_MESSAGE.encode() in await answer(port, call(b"\0\0\0\0\2\xff\xff", path))


async def test_each_message_of_a_stream_must_arrive(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "ARRIVAL_SECONDS", 0.3)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    channel: Any
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = [it async for it in stub.ServerReflectionInfo(iter([asked, asked]), timeout=5)]
        assert [it.list_services_response.service[0].name for it in answers] == [reflection.SERVICE_NAME] * 2
        stream = stub.ServerReflectionInfo(timeout=5)
        await stream.write(asked)
        assert await stream.read()
        assert await stream.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("path", [CHECK, WATCH])
async def test_a_call_that_ends_without_a_message_is_told_so(port: int, path: str) -> None:
    """gRPC itself would leave its client waiting."""
    assert NO_MESSAGE.encode() in await answer(port, call(b"", path))


async def test_answers_come_as_they_would_without_it(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "LATE_SECONDS", 0.05)
    monkeypatch.setattr(arrival, "ARRIVAL_SECONDS", 0.1)
    serving = health_pb2.HealthCheckResponse.SERVING
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await health.check(channel) == serving
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == serving
        await asyncio.sleep(0.3)
        assert not watch.done()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health.check(channel, "unknown")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
