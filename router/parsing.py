"""Parses the messages of calls. Where that fails the answer is INVALID_ARGUMENT, and not UNKNOWN as grpcio's."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from grpc import HandlerCallDetails, RpcMethodHandler

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
            CallError: RESOURCE_EXHAUSTED if too much waits already.
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


class ParseInterceptor(grpc.aio.ServerInterceptor):
    """Applies to methods that are coroutines and take one message: all but reflection's.

    Args:
        service: full name of the service whose refused calls are counted and logged.
        metrics: counts them.
    """

    def __init__(self, service: str, metrics: Metrics) -> None:
        self._prefix = f"/{service}/"
        self._metrics = metrics
        self._large = LargeMessages()

    async def intercept_service(
        self,
        continuation: "Callable[[HandlerCallDetails], Awaitable[RpcMethodHandler[Any, Any] | None]]",
        details: HandlerCallDetails,
    ) -> "RpcMethodHandler[Any, Any] | None":
        handler = await continuation(details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        serve: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        return make(
            self._parsed(serve, handler.request_deserializer, details.method),
            response_serializer=handler.response_serializer,
        )

    def _parsed(
        self, serve: Callable[[Any, Any], Awaitable[Any]], parse: Callable[[bytes], Message], method: str
    ) -> Callable[[bytes, Any], Awaitable[Any]]:
        async def parse_and_serve(received: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
            try:
                if len(received) < LARGE_BYTES:
                    message = parse(received)
                else:
                    message = await self._large.parse(received, parse)
            except DecodeError:
                sentence = f"what was sent is no message that {method} takes"
                await self._refuse(method, context, CallError(grpc.StatusCode.INVALID_ARGUMENT, sentence))
            except CallError as error:
                await self._refuse(method, context, error)
            return await serve(message, context)

        async def call(received: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
            try:
                return await parse_and_serve(received, context)
            except grpc.aio.AbortError as error:
                # gRPC's context keeps the error, whose frames keep the context, and the message of the call: until the
                # garbage collector comes, which is rarely.
                del received
                error.__context__ = None
                raise error.with_traceback(None) from None

        return call

    async def _refuse(self, method: str, context: "grpc.aio.ServicerContext[Any, Any]", error: CallError) -> None:
        if method.startswith(self._prefix):
            short = method.removeprefix(self._prefix)
            self._metrics.calls.labels(short, error.code.name).inc()
            log.info("call failed", method=short, code=error.code.name, reason=error.message)
        await context.abort(error.code, error.message)
