"""Metrics over HTTP and HTTPS, and to whom they are shown."""

import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, Counter

from common.network.free_port import free_port
from common.security import certificates
from common.security.certificates import Certificates
from common.security.security_config import SecurityConfig
from common.start_error import AddressError, StartError
from common.telemetry import metrics_server
from common.worker.worker_metrics import WorkerMetrics
from router.metrics import Metrics
from tests.certificates import Signed, sign
from tests.router import models

ROOT = Path(__file__).parents[2]

EXPIRY = "twostroke_certificate_expiry_timestamp_seconds"

# What a caller sees of a server that does not speak with it depends on how far it had come.
CUT_OFF = (URLError, ConnectionError, ssl.SSLError)


PLAIN = Certificates(SecurityConfig())


def serve(config: SecurityConfig, listen: str = "127.0.0.1:8600") -> int:
    registry = CollectorRegistry()
    Counter("things", "Things", registry=registry).inc(3)
    port = free_port()
    metrics_server.serve(registry, listen, port, Certificates(config))
    return port


def get(url: str, context: ssl.SSLContext | None = None) -> str:
    with urlopen(url, timeout=10, context=context) as response:
        return str(response.read().decode())


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return sign(tmp_path / "signed")


def test_plain_where_nothing_is_set() -> None:
    exported = get(f"http://127.0.0.1:{serve(SecurityConfig())}/metrics")
    assert "things_total 3.0" in exported
    assert EXPIRY not in exported


def test_beside_a_socket_it_is_on_loopback() -> None:
    assert "things_total 3.0" in get(f"http://127.0.0.1:{serve(SecurityConfig(), 'unix:/run/router')}/metrics")


def test_without_a_port_nothing_is_served() -> None:
    before = set(threading.enumerate())  # of which those of other tests' servers may end meanwhile
    metrics_server.serve(CollectorRegistry(), "127.0.0.1:8600", None, PLAIN)
    assert set(threading.enumerate()) <= before


def test_with_a_certificate_it_is_tls_and_nothing_else(signed: Signed) -> None:
    port = serve(SecurityConfig(tls_cert=signed.cert, tls_key=signed.key))
    context = ssl.create_default_context(cafile=signed.ca)
    assert "things_total 3.0" in get(f"https://127.0.0.1:{port}/metrics", context)
    with pytest.raises(CUT_OFF):
        get(f"http://127.0.0.1:{port}/metrics")
    with pytest.raises(URLError, match="certificate verify failed"):
        get(f"https://127.0.0.1:{port}/metrics", ssl.create_default_context())


def test_mutual_tls_asks_for_a_certificate(signed: Signed, tmp_path: Path) -> None:
    port = serve(SecurityConfig(tls_cert=signed.cert, tls_key=signed.key, tls_client_ca=signed.ca))
    context = ssl.create_default_context(cafile=signed.ca)
    with pytest.raises(CUT_OFF):
        get(f"https://127.0.0.1:{port}/metrics", context)
    stranger = sign(tmp_path / "stranger")
    context.load_cert_chain(stranger.cert, stranger.key)
    with pytest.raises(CUT_OFF):
        get(f"https://127.0.0.1:{port}/metrics", context)
    context = ssl.create_default_context(cafile=signed.ca)
    context.load_cert_chain(signed.cert, signed.key)
    assert "things_total 3.0" in get(f"https://127.0.0.1:{port}/metrics", context)


def expiry(exported: str) -> datetime:
    (seconds,) = re.findall(rf"^{EXPIRY} (\S+)$", exported, re.MULTILINE)
    return datetime.fromtimestamp(float(seconds), UTC)


def test_renewed_files_count_from_the_next_scrape(
    signed: Signed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For who may scrape, too."""
    monkeypatch.setattr(certificates, "LOOK_SECONDS", 0.0)
    port = serve(SecurityConfig(tls_cert=signed.cert, tls_key=signed.key, tls_client_ca=signed.ca))
    before = ssl.create_default_context(cafile=signed.ca)
    before.load_cert_chain(signed.cert, signed.key)
    assert expiry(get(f"https://127.0.0.1:{port}/metrics", before)).year == 3000
    then = datetime(2031, 2, 3, 4, 5, 6)
    renewed = sign(tmp_path / "renewed", not_after=then)
    signed.become(renewed)
    now = ssl.create_default_context(cafile=renewed.ca)
    now.load_cert_chain(renewed.cert, renewed.key)
    assert expiry(get(f"https://127.0.0.1:{port}/metrics", now)) == then.replace(tzinfo=UTC)
    before.load_verify_locations(renewed.ca)
    with pytest.raises(CUT_OFF):
        get(f"https://127.0.0.1:{port}/metrics", before)


def test_a_caller_that_stalls_keeps_nobody_waiting_and_is_left(
    signed: Signed, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In its handshake, or after it."""
    monkeypatch.setattr(metrics_server, "SILENCE_SECONDS", 1.0)
    plain, port = serve(SecurityConfig()), serve(SecurityConfig(tls_cert=signed.cert, tls_key=signed.key))
    context = ssl.create_default_context(cafile=signed.ca)
    address = ("127.0.0.1", port)
    with (
        socket.create_connection(("127.0.0.1", plain), timeout=10) as in_plain_text,
        socket.create_connection(address, timeout=10) as says_nothing,
        socket.create_connection(address, timeout=10) as connection,
        context.wrap_socket(connection, server_hostname="127.0.0.1") as asks_nothing,
    ):
        assert "things_total 3.0" in get(f"https://127.0.0.1:{port}/metrics", context)
        assert in_plain_text.recv(1) == says_nothing.recv(1) == asks_nothing.recv(1) == b""
    assert capfd.readouterr().err == ""


def test_a_port_that_is_taken() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(AddressError, match=r"cannot serve metrics at 127\.0\.0\.1:\d+: .* Is the port taken\?"),
    ):
        metrics_server.serve(CollectorRegistry(), "127.0.0.1:8600", taken.getsockname()[1], PLAIN)


@pytest.mark.parametrize("part", ["router", "prefill_worker", "decode_worker"])
def test_a_part_whose_metrics_port_is_taken_says_so_in_a_line(part: str, tmp_path: Path) -> None:
    models.write(tmp_path, models.byte_level())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = [f"--model={tmp_path}", "--listen=127.0.0.1:0", f"--metrics-port={port}"]
        if part != "router":
            flags += ["--load-format=dummy", "--num-blocks=64", "--device=cpu"]
        started = subprocess.run(
            [sys.executable, "-m", part, *flags],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert started.returncode == 1
    assert started.stderr.splitlines()[-1].startswith(
        f"twostroke {part.replace('_', '-')}: cannot serve metrics at 127.0.0.1:{port}: "
    )
    assert "Traceback" not in started.stderr


@pytest.mark.parametrize("make", [Metrics, WorkerMetrics])
def test_a_directory_for_values_that_is_none(
    make: type[Metrics | WorkerMetrics], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """prometheus_client would fail with a traceback, or write to wherever the part was started."""
    for directory in (str(tmp_path / "missing"), __file__, ""):
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", directory)
        with pytest.raises(StartError, match=r"has PROMETHEUS_MULTIPROC_DIR='.*', which is no directory .*: unset it"):
            make()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    make()
