"""A part's Prometheus metrics over HTTP, as protected as its other port."""

from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server

from common.addresses import is_unix
from common.security_config import SecurityConfig
from common.start_error import AddressError


def serve(registry: CollectorRegistry, listen: str, port: int | None, config: SecurityConfig) -> None:
    """Serves the metrics at `port` on the host of `listen` (where that is a socket's path, on loopback), from now on;
    nothing where there is no port. With a certificate it speaks TLS only, with `tls_client_ca` only to callers with a
    certificate. Its files must be right: `Peers.of` has looked at them.

    Raises:
        AddressError: the address cannot be listened on.
    """
    if port is None:
        return
    host = "127.0.0.1" if is_unix(listen) else listen.rpartition(":")[0].strip("[]")
    try:
        start_http_server(
            port,
            host,
            registry,
            certfile=_name(config.tls_cert),
            keyfile=_name(config.tls_key),
            client_cafile=_name(config.tls_client_ca),
            client_auth_required=config.tls_client_ca is not None,
        )
    except OSError as error:
        raise AddressError(f"cannot serve metrics at {host}:{port}: {error.strerror}. Is the port taken?") from error


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)
