"""What gRPC makes of certificate files, and of renewed ones. Real handshakes on loopback, without a service."""

import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from common.security import certificates, pem, tls
from common.security.certificates import Certificates
from common.security.security_config import SecurityConfig, TlsConfig
from common.security.tls import channel_credentials, channel_options, server_credentials
from tests.certificates import Signed, replace, sign

READY, FAILED = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE

# What a caller sees of a server that does not let it in depends on how far it had come.
CUT_OFF = (OSError, ValueError)


@pytest.fixture(autouse=True)
def every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "LOOK_SECONDS", 0.0)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that call one by one."""
    monkeypatch.setattr(tls, "PAUSE_SECONDS", 0.0)


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return sign(tmp_path / "signed")


@pytest.fixture
def renewed(tmp_path: Path) -> Signed:
    return sign(tmp_path / "renewed")


@pytest.fixture
def serving(signed: Signed) -> Iterator[Callable[[bool], int]]:
    """Starts a server with the files of `signed`, and tells its port."""
    with ExitStack() as started:

        def serve(mutual: bool) -> int:
            config = SecurityConfig(
                tls_cert=signed.cert, tls_key=signed.key, tls_client_ca=signed.ca if mutual else None
            )
            server = grpc.server(ThreadPoolExecutor(1))
            credentials = server_credentials(Certificates(config))
            assert credentials is not None
            port = server.add_secure_port("127.0.0.1:0", credentials)
            server.start()
            started.callback(server.stop, 0)
            return port

        yield serve


def caller(*trusted: Signed, own: Signed | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    for authority in trusted:
        context.load_verify_locations(authority.ca)
    if own is not None:
        context.load_cert_chain(own.cert, own.key)
    return context


def call(
    port: int, context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> tuple[bytes | None, ssl.SSLSession | None, bool]:
    """The server's certificate, the session for the next call, and whether this one resumed the one that was given."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as connection,
        context.wrap_socket(connection, server_hostname="127.0.0.1", session=session) as secured,
    ):
        if not secured.recv(1):  # of HTTP/2's settings, which come once the server is content with the caller
            raise ConnectionError
        return secured.getpeercert(binary_form=True), secured.session, bool(secured.session_reused)


def certificate(signed: Signed) -> bytes:
    return ssl.PEM_cert_to_DER_cert(signed.cert.read_text())


def test_without_files_there_is_plain_text() -> None:
    assert server_credentials(Certificates(SecurityConfig())) is None
    assert channel_credentials(pem.read(SecurityConfig())) is None
    assert channel_options(SecurityConfig(tls_server_name="router")) == ()


def test_a_certificate_alone_serves_tls_and_calls_in_plain_text(signed: Signed) -> None:
    files = Certificates(SecurityConfig(tls_cert=signed.cert, tls_key=signed.key))
    assert server_credentials(files) is not None
    assert channel_credentials(files.now()) is None


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("mutual", [False, True])
def test_a_renewed_certificate_is_shown_to_the_next_caller(
    signed: Signed, renewed: Signed, serving: Callable[[bool], int], mutual: bool
) -> None:
    port, first = serving(mutual), certificate(signed)
    context = caller(signed, renewed, own=signed)
    assert call(port, context)[0] == call(port, context)[0] == first
    replace(signed.cert, renewed.cert.read_bytes())
    assert call(port, context)[0] == first  # its key is still to come
    replace(signed.key, renewed.key.read_bytes())
    assert call(port, context)[0] == certificate(renewed)


@pytest.mark.usefixtures("at_once")
def test_callers_of_the_authority_of_before_are_refused_once_it_is_replaced(
    signed: Signed, renewed: Signed, serving: Callable[[bool], int]
) -> None:
    port = serving(True)
    of_before, of_now, stranger = caller(signed, own=signed), caller(signed, own=renewed), caller(signed)
    for lets_in, refuses in ((of_before, of_now), (of_now, of_before)):
        assert call(port, lets_in)[0] == certificate(signed)
        for context in (refuses, stranger):
            with pytest.raises(CUT_OFF):
                call(port, context)
        replace(signed.ca, renewed.ca.read_bytes())


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_of_before_is_no_way_in(
    signed: Signed, renewed: Signed, serving: Callable[[bool], int], version: ssl.TLSVersion
) -> None:
    """A caller that resumes one shows no certificate, and is shown none."""
    port, context = serving(True), caller(signed, renewed, own=signed)
    context.minimum_version = context.maximum_version = version
    _, session, _ = call(port, context)
    _, session, resumed = call(port, context, session)
    assert resumed
    replace(signed.cert, renewed.cert.read_bytes())
    replace(signed.key, renewed.key.read_bytes())
    shown, newer, resumed = call(port, context, session)
    assert shown == certificate(renewed)
    assert not resumed
    _, newer, resumed = call(port, context, newer)
    assert resumed  # nothing has changed, and nothing is set up again
    replace(signed.ca, renewed.ca.read_bytes())
    for given in (session, newer):
        with pytest.raises(CUT_OFF):
            call(port, context, given)


def test_grpc_has_time_to_get_on_with_other_connections(
    signed: Signed, renewed: Signed, serving: Callable[[bool], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, renewals under a load of new connections end this process now and then."""
    pauses: list[float] = []
    monkeypatch.setattr(tls, "time", SimpleNamespace(sleep=pauses.append))
    port, context = serving(False), caller(signed, renewed)
    call(port, context)
    assert not pauses
    for _ in range(2):
        signed.become(renewed)
        for _ in range(2):
            call(port, context)
    assert pauses == 2 * [tls.PAUSE_SECONDS]


def test_no_caller_is_lost_to_a_renewal(
    signed: Signed, renewed: Signed, tmp_path: Path, serving: Callable[[bool], int]
) -> None:
    first = sign(tmp_path / "first")
    first.become(signed)
    port, context = serving(False), caller(signed, renewed)
    done, shown = threading.Event(), set[bytes | None]()

    def keep_calling() -> int:
        calls = 0
        while not done.is_set() or not calls:
            shown.add(call(port, context)[0])
            calls += 1
        return calls

    with ThreadPoolExecutor(8) as callers:
        calling = [callers.submit(keep_calling) for _ in range(8)]
        try:
            for files in (renewed, first, renewed):
                signed.become(files)
                assert call(port, context)[0] == certificate(files)
        finally:
            done.set()
        assert all(count.result(60) for count in calling)
    assert shown <= {certificate(first), certificate(renewed)}


@pytest.mark.usefixtures("at_once")
def test_a_channel_connects_with_the_files_of_its_making(
    signed: Signed, renewed: Signed, serving: Callable[[bool], int]
) -> None:
    """Whatever connections to the same place this process has already."""
    target, mine = f"127.0.0.1:{serving(True)}", TlsConfig(renewed.ca, renewed.cert, renewed.key)

    def state(channel: grpc.Channel) -> grpc.ChannelConnectivity:
        states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
        channel.subscribe(states.put, try_to_connect=True)
        while (found := states.get(timeout=10)) not in (READY, FAILED):
            pass
        return found

    def credentials(files: TlsConfig) -> grpc.ChannelCredentials:
        made = channel_credentials(pem.read(files))
        assert made is not None
        return made

    with ExitStack() as open_until_the_end:
        right = credentials(TlsConfig(signed.ca, signed.cert, signed.key))
        stays = open_until_the_end.enter_context(grpc.secure_channel(target, right))
        assert state(stays) is READY
        for expected in (FAILED, READY):
            channel = grpc.secure_channel(target, credentials(mine))
            assert state(open_until_the_end.enter_context(channel)) is expected
            renewed.become(signed)
        replace(signed.ca, sign(signed.ca.parent / "third").ca.read_bytes())
        assert state(open_until_the_end.enter_context(grpc.secure_channel(target, right))) is FAILED
        assert state(stays) is READY
