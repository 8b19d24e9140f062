"""Metrics over HTTP and HTTPS, and to whom they are shown."""

import os
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, Counter

from common import metrics_server
from common.security_config import SecurityConfig
from common.start_error import AddressError
from tests.certificates import Signed, sign
from tests.router import models

ROOT = Path(__file__).parents[2]

# What a caller sees of a server that does not speak with it depends on how far it had come.
CUT_OFF = (URLError, ConnectionError, ssl.SSLError)


def serve(config: SecurityConfig, listen: str = "127.0.0.1:8600") -> int:
    registry = CollectorRegistry()
    Counter("things", "Things", registry=registry).inc(3)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    metrics_server.serve(registry, listen, port, config)
    return port


def get(url: str, context: ssl.SSLContext | None = None) -> str:
    with urlopen(url, timeout=10, context=context) as response:
        return str(response.read().decode())


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return sign(tmp_path / "signed")


def test_plain_where_nothing_is_set() -> None:
    assert "things_total 3.0" in get(f"http://127.0.0.1:{serve(SecurityConfig())}/metrics")


def test_beside_a_socket_it_is_on_loopback() -> None:
    assert "things_total 3.0" in get(f"http://127.0.0.1:{serve(SecurityConfig(), 'unix:/run/router')}/metrics")


def test_without_a_port_nothing_is_served() -> None:
    before = threading.active_count()
    metrics_server.serve(CollectorRegistry(), "127.0.0.1:8600", None, SecurityConfig())
    assert threading.active_count() == before


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


def test_a_port_that_is_taken() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(AddressError, match=r"cannot serve metrics at 127\.0\.0\.1:\d+: .* Is the port taken\?"),
    ):
        metrics_server.serve(CollectorRegistry(), "127.0.0.1:8600", taken.getsockname()[1], SecurityConfig())


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
    assert started.stderr.splitlines()[-1].startswith(f"twostroke: cannot serve metrics at 127.0.0.1:{port}: ")
    assert "Traceback" not in started.stderr
