"""Limits how long, and for how many calls, a part waits for messages that do not arrive.

gRPC holds what has come of a message, and strangers can begin calls, too: of health, for example.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import HandlerCallDetails, RpcMethodHandler

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

# Makes a message of what came, by gRPC's function for it, for a call of the method that is named; or ends the call.
Parse: TypeAlias = Callable[[bytes, Callable[[bytes], Message], str, Context], Awaitable[Message]]

# The same for a message of several; what it raises, the method gets in place of the message.
ParseEach: TypeAlias = Callable[[bytes, Callable[[bytes], Message], str], Awaitable[Message]]

# From a call's beginning until its message is there.
ARRIVAL_SECONDS = 10.0

# A message that is not there after so many seconds is late, and so many may be, of one host and of all.
LATE_SECONDS = 2.0
MOST_LATE_OF_A_HOST = 32
MOST_LATE = 2 * MOST_LATE_OF_A_HOST

NO_MESSAGE = "the call came without a message"
WRONG_MESSAGE = "what was sent is no message that this method takes"
LATE = "the call's message did not arrive in time; it is safe to try again"


class ArrivalInterceptor(grpc.aio.ServerInterceptor):
    """Applies to methods that are coroutines and take one message. The first of a server's interceptors.

    Args:
        service: full name of one whose methods are generators and take streams, to each of whose messages it applies,
            too; empty if there is none.
        parse: parses messages that come alone; None: gRPC does.
        parse_each: parses those that come in streams, of methods that are coroutines. These may take any time to come.
    """

    def __init__(self, service: str = "", parse: Parse | None = None, parse_each: ParseEach | None = None) -> None:
        self._prefix = f"/{service}/"
        self._parse = parse
        self._parse_each = parse_each
        self._late: Counter[str] = Counter()  # calls whose message is, by host

    async def intercept_service(
        self,
        continuation: "Callable[[HandlerCallDetails], Awaitable[RpcMethodHandler[Any, Any] | None]]",
        details: HandlerCallDetails,
    ) -> "RpcMethodHandler[Any, Any] | None":
        handler = await continuation(details)
        if handler is None:
            return None
        if handler.request_streaming:
            if details.method.startswith(self._prefix):
                return self._of_streams(handler)
            return handler if self._parse_each is None else self._parsed(handler, self._parse_each, details.method)
        # Of a method that takes one message gRPC would read that by itself, and wait for it without end.
        parse = self._parse
        deserialize: Any = handler.request_deserializer
        make: Any
        serve: Any
        if handler.response_streaming:
            make, serve = grpc.stream_stream_rpc_method_handler, handler.unary_stream
        else:
            make, serve = grpc.stream_unary_rpc_method_handler, handler.unary_unary

        async def call(_: object, context: Context) -> Any:
            message = await self._read(context)
            if message is grpc.aio.EOF:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
            try:
                if parse is not None:
                    message = await parse(message, deserialize, details.method, context)
                return await serve(message, context)
            except grpc.aio.AbortError as error:
                del message
                _forget_frames(error)
                raise

        handled: RpcMethodHandler[Any, Any]
        handled = make(call, deserialize if parse is None else None, handler.response_serializer)
        return handled

    def _of_streams(self, handler: "RpcMethodHandler[Any, Any]") -> "RpcMethodHandler[Any, Any]":
        serve: Any = handler.stream_stream

        async def messages(context: Context) -> AsyncIterator[Any]:
            while (message := await self._read(context)) is not grpc.aio.EOF:
                yield message

        async def call(_: object, context: Context) -> AsyncIterator[Any]:
            async for answer in serve(messages(context), context):
                yield answer

        make: Any = grpc.stream_stream_rpc_method_handler
        handled: RpcMethodHandler[Any, Any] = make(call, handler.request_deserializer, handler.response_serializer)
        return handled

    def _parsed(
        self, handler: "RpcMethodHandler[Any, Any]", parse: ParseEach, method: str
    ) -> "RpcMethodHandler[Any, Any]":
        deserialize: Any = handler.request_deserializer
        serve: Any = handler.stream_stream

        async def messages(context: Context) -> AsyncIterator[Any]:
            while (message := await context.read()) is not grpc.aio.EOF:
                yield await parse(message, deserialize, method)

        async def call(_: object, context: Context) -> None:
            try:
                await serve(messages(context), context)
            except grpc.aio.AbortError as error:
                _forget_frames(error)
                raise

        make: Any = grpc.stream_stream_rpc_method_handler
        handled: RpcMethodHandler[Any, Any] = make(call, None, handler.response_serializer)
        return handled

    async def _read(self, context: Context) -> Any:
        """The next message, or EOF; ends the call if neither comes."""
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
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, WRONG_MESSAGE)
        finally:
            timer.cancel()
            if is_late:
                self._late[host] -= 1
                self._late += Counter()  # forgets hosts that have none
        return message


def _forget_frames(error: BaseException | None) -> None:
    """gRPC's context keeps the error that ends a call. The frames that it and the errors before it were raised through
    keep these errors, the context, and the call's message: until the garbage collector comes, which is rarely."""
    while error is not None:
        error.__traceback__ = None
        before, error.__context__ = error.__context__, None
        error = before
