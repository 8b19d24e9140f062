"""Serves a part's Prometheus metrics over HTTP, with the same certificates as its other port."""

import math
import os
import socket
import sys
import threading
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, Gauge, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from common.network.addresses import is_unix
from common.security.certificates import Certificates
from common.start_error import AddressError, StartError

Request = socket.socket | tuple[bytes, socket.socket]

# How long a caller may stay silent.
SILENCE_SECONDS = 10.0

# With this variable, prometheus_client keeps values in files: for applications of several processes behind one port.
VALUES_IN_FILES = "PROMETHEUS_MULTIPROC_DIR"


def new_registry() -> CollectorRegistry:
    """For the metrics of a part.

    Raises:
        StartError: the environment names a directory for their values, and it cannot be written to.
    """
    directory = os.environ.get(VALUES_IN_FILES)
    if directory is not None and not (os.path.isdir(directory) and os.access(directory, os.W_OK | os.X_OK)):
        raise StartError(
            f"the environment has {VALUES_IN_FILES}={directory!r}, which is no directory that can be written to; a "
            "part is one process and needs none: unset it"
        )
    return CollectorRegistry()


def serve(registry: CollectorRegistry, listen: str, port: int | None, certificates: Certificates) -> None:
    """Serves `registry` from now on, on a thread; does nothing without a port.

    Args:
        registry: the metrics. With a certificate, its expiry is added to them.
        listen: the part's address, whose host is used; loopback if it is a Unix socket.
        port: where to listen.
        certificates: with a certificate of its own the server speaks TLS only; with authorities for clients it also
            asks callers for theirs.

    Raises:
        AddressError: the address cannot be listened on.
    """
    if port is None:
        return
    host = "127.0.0.1" if is_unix(listen) else listen.rpartition(":")[0].strip("[]")
    if certificates.now().own is not None:
        expires = Gauge(
            "twostroke_certificate_expiry_timestamp_seconds",
            "When the certificate that this part shows expires, in seconds since 1970",
            registry=registry,
        )
        expires.set_function(lambda: _expiry(certificates))
    try:
        server = _Server(host, port, certificates)
    except OSError as error:
        raise AddressError(f"cannot serve metrics at {host}:{port}: {error.strerror}. Is the port taken?") from error
    server.set_app(make_wsgi_app(registry))
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def _expiry(certificates: Certificates) -> float:
    own = certificates.now().own
    return math.nan if own is None or own.expires is None else own.expires


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Does not log scrapes."""


class _Server(ThreadingWSGIServer):
    """Gives each connection a thread, on which its TLS handshake runs, too, so that none waits for another."""

    def __init__(self, host: str, port: int, certificates: Certificates) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        self._certificates = certificates
        super().__init__((str(address[0]), port), _Handler)

    def finish_request(self, request: Request, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        request.settimeout(SILENCE_SECONDS)
        context = self._certificates.now().context
        if context is None:
            return super().finish_request(request, client_address)
        with context.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Request, client_address: object) -> None:
        """Does not log callers that go, stall or are refused."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)
