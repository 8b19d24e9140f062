"""Limits how long, and for how many calls, a part waits for messages that do not arrive.

gRPC holds what has come of a message, and strangers can begin calls, too: of health, for example.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc import HandlerCallDetails, RpcMethodHandler

# From a call's beginning until its message is there.
ARRIVAL_SECONDS = 10.0

# A message that is not there after so many seconds is late, and so many may be, of one host and of all.
LATE_SECONDS = 2.0
MOST_LATE_OF_A_HOST = 32
MOST_LATE = 2 * MOST_LATE_OF_A_HOST

NO_MESSAGE = "the call came without a message"
LATE = "the call's message did not arrive in time; it is safe to try again"


class ArrivalInterceptor(grpc.aio.ServerInterceptor):
    """Applies to methods that are coroutines and take one message. The first of a server's interceptors."""

    def __init__(self) -> None:
        self._late: Counter[str] = Counter()  # calls whose message is, by host

    async def intercept_service(
        self,
        continuation: "Callable[[HandlerCallDetails], Awaitable[RpcMethodHandler[Any, Any] | None]]",
        details: HandlerCallDetails,
    ) -> "RpcMethodHandler[Any, Any] | None":
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        # Of a method that takes one message gRPC would read that by itself, and wait for it without end.
        make: Any
        serve: Any
        if handler.response_streaming:
            make, serve = grpc.stream_stream_rpc_method_handler, handler.unary_stream
        else:
            make, serve = grpc.stream_unary_rpc_method_handler, handler.unary_unary

        async def call(_: object, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
            return await serve(await self._arrival(context), context)

        handled: RpcMethodHandler[Any, Any] = make(call, handler.request_deserializer, handler.response_serializer)
        return handled

    async def _arrival(self, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        """The call's message; ends the call if there is none."""
        loop, host, is_late = asyncio.get_running_loop(), context.peer().rpartition(":")[0], False

        def note_late() -> None:
            nonlocal is_late
            if self._late[host] >= MOST_LATE_OF_A_HOST or self._late.total() >= MOST_LATE:
                reading.reschedule(loop.time())
            else:
                is_late = True
                self._late[host] += 1

        timer = loop.call_later(LATE_SECONDS, note_late)
        try:
            async with asyncio.timeout(ARRIVAL_SECONDS) as reading:
                message = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, LATE)
        finally:
            timer.cancel()
            if is_late:
                self._late[host] -= 1
                self._late += Counter()  # forgets hosts that have none
        if message is grpc.aio.EOF:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
        return message
