"""What the sync and the async client's channels have in common."""

import re
from numbers import Real
from typing import cast

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from twostroke.errors import DeadlineExceeded, refused
from twostroke.fields import wrong_type

DEFAULT_TARGET = "localhost:8600"

# A router that vanished is noticed within half a minute while calls are under way; idle channels send nothing. One that
# restarts is found again within two seconds.
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # An answer is as large as its request allows: with log-probabilities, some 400 bytes for each of its tokens.
    ("grpc.max_receive_message_length", -1),
)

# The messages of grpc.health.v1 have one field each, numbered 1: on the wire they are what protobuf's own wrappers are.
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
HEALTH_OF_INFERENCE = StringValue(value="twostroke.v1.Inference")
HEALTH_TO_BYTES = StringValue.SerializeToString
HEALTH_FROM_BYTES = Int32Value.FromString
SERVING = 1

FOR_EVER = 1e9  # seconds

# Why a router is not ready. If it cannot be reached, gRPC says why.
NOBODY = "nothing answers there"
NO_WORKERS = "it has no workers that can serve yet"

_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")
_OF_SEVERAL = ("dns:", "ipv4:", "ipv6:")
_OF_THIS_MACHINE = ("localhost:", "127.", "[::1]:")
_HOST_AND_PORT = re.compile(r"(\[[^\[\]]+\]|[^:/\[\]]+):([0-9]{1,5})")


def checked(target: str) -> str:
    """The target, which gRPC itself would not check: it takes port 443 where there is none, 34463 for 99999, and
    http://host for a name.

    Raises:
        TypeError: it is no text.
        InvalidArgument: it is neither host:port nor has a scheme that gRPC knows.
    """
    if not isinstance(target, str):
        raise wrong_type("target", "text", target)
    if not target.startswith(_SCHEMES):
        parts = _HOST_AND_PORT.fullmatch(target)
        if parts is None or not 0 < int(parts[2]) < 1 << 16:
            problem = f"{target!r} is not host:port, such as {DEFAULT_TARGET}, with a port from 1 to 65535"
            raise refused("target", problem)
    return target


def credentials_of(tls: bool | grpc.ChannelCredentials, tls_server_name: str | None) -> grpc.ChannelCredentials | None:
    """None for plain text. `tls` is True for TLS against the system's certificate authorities.

    Raises:
        TypeError: one of them is of another type.
        InvalidArgument: there is a name for a certificate that nobody would ask for.
    """
    if not isinstance(cast(object, tls), bool | grpc.ChannelCredentials):
        raise wrong_type("tls", "true, false or what grpc.ssl_channel_credentials makes", tls)
    if not isinstance(cast(object, tls_server_name), str | None):
        raise wrong_type("tls_server_name", "text", tls_server_name)
    if tls_server_name and not tls:
        raise refused("tls_server_name", "goes with tls only; without it, calls are sent in plain text")
    if isinstance(tls, bool):
        return grpc.ssl_channel_credentials() if tls else None
    return tls


def options_of(target: str, tls_server_name: str | None) -> list[tuple[str, int | str]]:
    own_name = [("grpc.ssl_target_name_override", tls_server_name)] if tls_server_name else []
    # The policy keeps a connection to every address, also while nothing is asked. localhost has two, and one router.
    turns = [("grpc.lb_policy_name", "round_robin")] if target.startswith(_OF_SEVERAL) else []
    # The proxy that http_proxy names would look for it on its own machine.
    direct = [("grpc.enable_http_proxy", 0)] if target.startswith(_OF_THIS_MACHINE) else []
    return [*CHANNEL_OPTIONS, *own_name, *turns, *direct]


def metadata_of(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """
    Raises:
        TypeError: the key is no text.
        InvalidArgument: it has a character that gRPC does not send, such as the line end of the file it was read from.
            gRPC's own error would look like a fault of the router.
    """
    if not api_key:
        return ()
    if not isinstance(api_key, str):
        raise wrong_type("api_key", "text", api_key)
    for place, character in enumerate(api_key):
        if not " " <= character <= "~":
            raise refused("api_key", f"character {place} is {character!r}; only printable ASCII can be sent")
    return (("authorization", f"Bearer {api_key}"),)


def seconds_of(timeout: float | None, usual: float | None) -> float | None:
    """The seconds that a call has, None for as many as it takes. gRPC's clock would overflow after some centuries, and
    the call be over before it began.

    Raises:
        TypeError: the timeout is no number.
    """
    chosen = usual if timeout is None else timeout
    return None if chosen is None or seconds(chosen) > FOR_EVER else chosen


def seconds(timeout: float) -> float:
    """The timeout itself. Raises TypeError if it is no number."""
    if not isinstance(cast(object, timeout), Real):
        raise wrong_type("timeout", "a number of seconds", timeout)
    return timeout


def not_ready(target: str, timeout: float, reason: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"{target} was not ready within {timeout:g} s: {reason}", grpc.StatusCode.DEADLINE_EXCEEDED)
