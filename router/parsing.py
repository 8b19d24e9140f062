"""Answers a call whose message cannot be parsed with INVALID_ARGUMENT, where grpcio would say UNKNOWN."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import HandlerCallDetails, RpcMethodHandler


class ParseInterceptor(grpc.aio.ServerInterceptor):
    """Of calls that send one message, to methods that are coroutines: all that the router has, but for reflection."""

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
            _checked(serve, details.method),
            request_deserializer=_lenient(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Message | None]:
    def parse(received: bytes) -> Message | None:
        try:
            message: Message = deserialize(received)
            return message
        except DecodeError:
            return None

    return parse


def _checked(serve: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(message: Message | None, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        if message is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"what was sent is no message that {method} takes")
        return await serve(message, context)

    return call
