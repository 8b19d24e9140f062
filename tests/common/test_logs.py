import asyncio
import io
import os
import sys
from collections.abc import Iterator
from typing import Literal

import grpc
import pytest
import structlog

from common.telemetry import logs
from tests.raw_calls import call


class Stderr(io.StringIO):
    """Remembers each write: where nothing is buffered, each is a call of the operating system."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.mark.parametrize("log_format", ["people", "json"])
def test_a_line_is_one_write(log_format: Literal["people", "json"], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two, another process on the same stderr may write its own."""
    stderr = Stderr()
    monkeypatch.setattr(sys, "stderr", stderr)
    logs.configure(log_format)
    log = structlog.get_logger()
    log.info("call refused", peer="ipv4:10.0.0.1:99")
    try:
        raise ValueError("wrong")
    except ValueError:
        log.exception("call failed")
    assert len(stderr.writes) == 2
    assert all(text.endswith("\n") for text in stderr.writes)
    assert stderr.writes[0].count("\n") == 1


def test_what_cannot_be_written_is_lost_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        logs.configure("people")
        structlog.get_logger().info("worker connected")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # or closing it would fail


async def test_an_api_key_with_a_character_that_is_no_utf8_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logs.configure("people")
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(call(b"", metadata={"authorization": "Bearer alice.secret\udca0"}))
    async with asyncio.timeout(5):
        await reader.readuntil(b"grpc-status")
    writer.close()
    await server.stop(0)
    assert "alice" not in caplog.text
