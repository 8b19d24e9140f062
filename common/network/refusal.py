"""How an interceptor refuses a call."""

from collections.abc import Callable
from typing import Any

import grpc


def refuse(
    code: grpc.StatusCode, sentence: str, told: Callable[[str], None] = lambda _peer: None
) -> "grpc.RpcMethodHandler[Any, Any]":
    """A handler for a call of any kind, which ends it with `code` and `sentence` before its messages are read.
    `told` is called with the caller's address, as gRPC writes it."""

    async def end(_requests: object, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        told(context.peer())
        await context.abort(code, sentence)

    return grpc.stream_stream_rpc_method_handler(end)
