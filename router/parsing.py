"""Parses the messages of calls. Where that fails the answer is INVALID_ARGUMENT, and not UNKNOWN as grpcio's."""

import asyncio
import time
from collections.abc import Callable
from typing import NoReturn

import grpc
import structlog
from google.protobuf.message import DecodeError, Message

from common.network.arrival import Context
from router.callers.limits import CALLER
from router.callers.turns import Turns
from router.callers.waiting_bytes import WaitingBytes
from router.errors import CallError
from router.metrics import Metrics

log = structlog.get_logger(__name__)

# Parsing blocks the event loop, for 50 ns a byte where a message has nothing but small parts.
LARGE_BYTES = 16 * 1024

# The share of the router's time that parsing of large messages may take, and the seconds of it that are had at once.
SHARE = 0.25
AT_ONCE = 0.025


class LargeMessages:
    """Parses them one at a time, callers in turn, with pauses: a few of the worst at once would be a second in which
    nobody else gets a token."""

    def __init__(self) -> None:
        self._turns = Turns(1, 1)
        self._waiting = WaitingBytes("too many large messages wait to be parsed")
        self._paid_at = 0.0  # time.monotonic() when what was parsed will have been its share of the time

    async def parse(self, received: bytes, parse: Callable[[bytes], Message]) -> Message:
        """
        Raises:
            Exhausted: too much waits already.
        """
        caller = CALLER.get().name
        with self._waiting.counted(caller, len(received)):
            async with self._turns.place(caller):
                if (pause := self._paid_at - time.monotonic() - AT_ONCE / SHARE) > 0:
                    await asyncio.sleep(pause)
                began = time.thread_time()
                try:
                    return parse(received)
                finally:
                    took = time.thread_time() - began
                    self._paid_at = max(self._paid_at, time.monotonic()) + took / SHARE


class Parser:
    """Parses the messages of calls, and ends those with which that fails.

    Args:
        service: full name of the service whose refused calls are counted and logged.
        metrics: counts them.
    """

    def __init__(self, service: str, metrics: Metrics) -> None:
        self._prefix = f"/{service}/"
        self._metrics = metrics
        self._large = LargeMessages()

    async def parse(self, received: bytes, parse: Callable[[bytes], Message], method: str, context: Context) -> Message:
        try:
            return await self.parse_each(received, parse, method)
        except CallError as error:
            await self._refuse(method, context, error)

    async def parse_each(self, received: bytes, parse: Callable[[bytes], Message], method: str) -> Message:
        """
        Raises:
            CallError: that fails.
        """
        try:
            return parse(received) if len(received) < LARGE_BYTES else await self._large.parse(received, parse)
        except DecodeError:
            sentence = f"what was sent is no message that {method} takes"
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, sentence) from None

    async def _refuse(self, method: str, context: Context, error: CallError) -> NoReturn:
        if method.startswith(self._prefix):
            short = method.removeprefix(self._prefix)
            self._metrics.calls.labels(short, error.code.name).inc()
            log.info("call failed", method=short, code=error.code.name, reason=error.message)
        await context.abort(error.code, error.message)
