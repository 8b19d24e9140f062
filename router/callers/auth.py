"""Refuses calls without a valid API key, and those beyond the key's limits."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import grpc
import structlog
from grpc import HandlerCallDetails, RpcMethodHandler

from common.network.refusal import refuse
from common.security.cluster_secret import metadata_value, same
from router.callers.api_keys import ApiKeys
from router.callers.limits import CALL_AGAIN, CALLER, Caller
from router.callers.refusal_log import RefusalLog
from router.errors import CallError
from router.metrics import Metrics

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

SCHEME = "bearer "
NO_KEY = "this router needs an API key: send the metadata authorization: Bearer KEY"
WRONG_KEY = "the API key is not one of this router's"

# A caller that has the cluster's secret, such as `serve` or an operator who asks for the load. It could pose as a
# worker anyway.
CLUSTER = Caller("the cluster", cache_group="the cluster")


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Guards one service, given by its full name. Others, such as health and reflection, stay open."""

    def __init__(self, service: str, keys: ApiKeys, secret: str | None, metrics: Metrics) -> None:
        self._prefix = f"/{service}/"
        self._keys = keys
        self._secret = secret
        self._metrics = metrics
        self._refusals = RefusalLog()

    async def intercept_service(
        self,
        continuation: "Callable[[HandlerCallDetails], Awaitable[RpcMethodHandler[_Request, _Response] | None]]",
        details: HandlerCallDetails,
    ) -> "RpcMethodHandler[_Request, _Response] | None":
        handler = await continuation(details)
        if handler is None or not details.method.startswith(self._prefix):
            return handler
        count = partial(self._counted, metadata_value(details.invocation_metadata, "authorization"))
        try:
            CALLER.set(count(details.method.removeprefix(self._prefix)))
        except CallError as error:
            return refuse(error.code, error.message)
        CALL_AGAIN.set(count)
        return handler

    def _counted(self, authorization: str | bytes, method: str) -> Caller:
        """Counts a call.

        Raises:
            CallError: it is refused, which is counted and logged.
        """
        name = ""
        try:
            caller = self._caller(authorization)
            name = caller.name
            structlog.contextvars.bind_contextvars(caller=name)
            caller.call()
        except CallError as error:
            self._metrics.calls.labels(method, error.code.name).inc()
            self._refusals.tell(name or error.message, method, error)
            raise
        return caller

    def _caller(self, authorization: str | bytes) -> Caller:
        if not isinstance(authorization, str) or not authorization.lower().startswith(SCHEME):
            raise CallError(grpc.StatusCode.UNAUTHENTICATED, NO_KEY)
        key = authorization[len(SCHEME) :].strip()
        if caller := self._keys.caller(key):
            return caller
        if self._secret is not None and same(key, self._secret):
            return CLUSTER
        raise CallError(grpc.StatusCode.UNAUTHENTICATED, WRONG_KEY)
