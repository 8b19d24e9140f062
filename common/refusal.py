"""How an interceptor turns a call away."""

from typing import Any

import grpc


def refuse(code: grpc.StatusCode, sentence: str) -> "grpc.RpcMethodHandler[Any, Any]":
    """A handler for a call of any kind that ends it before its messages are read."""

    async def end(_requests: object, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        await context.abort(code, sentence)

    return grpc.stream_stream_rpc_method_handler(end)
