"""The secret by which routers and workers of a cluster know one another, sent as metadata of the calls between them."""

import hmac
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

import grpc
import structlog
from grpc import HandlerCallDetails, RpcMethodHandler

from common.network.refusal import refuse
from common.security.security_config import SettingsError

log = structlog.get_logger(__name__)

METADATA_KEY = "twostroke-cluster-secret"
MIN_LENGTH = 16

# Whoever is refused tries again, about twice a second: refusals are logged once per host in this time.
TELL_AGAIN_SECONDS = 600.0
MAX_HOSTS = 1024

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


def read(path: Path) -> str:
    """
    Raises:
        SettingsError: the file cannot be read, or its secret is too short or not printable ASCII.
    """
    try:
        secret = path.read_text().strip()
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"--cluster-secret-file: cannot read {path}: {error}") from error
    if len(secret) < MIN_LENGTH or not secret.isascii() or not secret.isprintable():
        raise SettingsError(
            f"--cluster-secret-file {path} must hold one line of {MIN_LENGTH} or more printable ASCII characters; "
            "make one with: openssl rand -hex 32"
        )
    return secret


def same(given: str | bytes, secret: str | bytes) -> bool:
    """Compares in constant time, so that nothing can be learned from how long it takes."""
    given, secret = (value.encode() if isinstance(value, str) else value for value in (given, secret))
    return hmac.compare_digest(given, secret)


def metadata_value(metadata: Iterable[tuple[str, str | bytes]] | None, key: str) -> str | bytes:
    """The value of `key` in a call's metadata; empty if it has none."""
    return next((value for name, value in metadata or () if name == key), "")


class SecretInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls of one service without the secret. Health, reflection and other services stay open.

    Args:
        service: full name of the service.
        secret: what callers must send. None: every call is refused.
        refusal: what refused callers are told.
    """

    def __init__(self, service: str, secret: str | None, refusal: str) -> None:
        self._prefix = f"/{service}/"
        self._secret = secret
        self._refusal = refusal
        self._told: dict[str, float] = {}  # time.monotonic() by host, the latest last

    async def intercept_service(
        self,
        continuation: "Callable[[HandlerCallDetails], Awaitable[RpcMethodHandler[_Request, _Response] | None]]",
        details: HandlerCallDetails,
    ) -> "RpcMethodHandler[_Request, _Response] | None":
        if details.method.startswith(self._prefix):
            given = metadata_value(details.invocation_metadata, METADATA_KEY)
            if self._secret is None or not same(given, self._secret):
                return refuse(grpc.StatusCode.UNAUTHENTICATED, self._refusal, partial(self._tell, details.method))
        return await continuation(details)

    def _tell(self, method: str, peer: str) -> None:
        host = unquote(peer.rpartition(":")[0])  # without the port, which changes with each try
        now = time.monotonic()
        if now - self._told.get(host, -TELL_AGAIN_SECONDS) < TELL_AGAIN_SECONDS:
            return
        self._told.pop(host, None)
        if len(self._told) >= MAX_HOSTS:
            del self._told[next(iter(self._told))]
        self._told[host] = now
        log.warning("call refused", method=method, peer=host, reason=self._refusal)
