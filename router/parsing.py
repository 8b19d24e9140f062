"""Answers calls whose message can't be parsed with INVALID_ARGUMENT, where grpcio would answer UNKNOWN."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from grpc import HandlerCallDetails, RpcMethodHandler

from router.metrics import Metrics

log = structlog.get_logger(__name__)


class ParseInterceptor(grpc.aio.ServerInterceptor):
    """Applies to methods that are coroutines and take one message: all but reflection's.

    Args:
        service: full name of the service whose refused calls are counted and logged.
        metrics: counts them.
    """

    def __init__(self, service: str, metrics: Metrics) -> None:
        self._prefix = f"/{service}/"
        self._metrics = metrics

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
            self._checked(serve, details.method),
            request_deserializer=_lenient(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _checked(
        self, serve: Callable[[Any, Any], Awaitable[Any]], method: str
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def check_and_serve(message: Message | None, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
            if message is None:
                await self._refuse(method, context)
            return await serve(message, context)

        async def call(message: Message | None, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
            try:
                return await check_and_serve(message, context)
            except grpc.aio.AbortError as error:
                # gRPC's context keeps the error, whose frames keep the context, and the message of the call: until the
                # garbage collector comes, which is rarely.
                del message
                error.__context__ = None
                raise error.with_traceback(None) from None

        return call

    async def _refuse(self, method: str, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        code, sentence = grpc.StatusCode.INVALID_ARGUMENT, f"what was sent is no message that {method} takes"
        if method.startswith(self._prefix):
            short = method.removeprefix(self._prefix)
            self._metrics.calls.labels(short, code.name).inc()
            log.info("call failed", method=short, code=code.name, reason=sentence)
        await context.abort(code, sentence)


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Message | None]:
    def parse(received: bytes) -> Message | None:
        try:
            message: Message = deserialize(received)
            return message
        except DecodeError:
            return None

    return parse
