"""Ten thousand connections that do nothing, at a router of its own process."""

import resource
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.tiny import prompt, tiny_cluster

CONNECTIONS = 10_000
SPARE = 500  # files that the test and the router have open beside
MOST_KIB = 96  # of memory, that a connection may cost the router

SILENT = b""
# The client's half of a handshake (RFC 9113, section 3.4), with an empty SETTINGS frame.
SAID_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.fixture
def many_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CONNECTIONS + SPARE:
        pytest.skip(f"a process may have {hard} files open here, not {CONNECTIONS + SPARE}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@pytest.mark.slow
@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("hello", [SILENT, SAID_HELLO], ids=["silent", "said hello"])
def test_they_keep_nobody_from_being_served(tmp_path: Path, hello: bytes) -> None:
    with tiny_cluster(tmp_path) as cluster:
        asked = prompt(20)
        wanted = cluster.client.generate(asked, max_tokens=8, temperature=0).token_ids
        files, kib = _open_files(cluster), _resident_kib(cluster)
        with ExitStack() as connections:
            host, _, port = cluster.target.rpartition(":")
            for _ in range(CONNECTIONS):
                connection = connections.enter_context(socket.create_connection((host, int(port)), timeout=10))
                connection.sendall(hello)
            cluster.wait_for(lambda: _open_files(cluster) >= files + CONNECTIONS, 30)
            assert cluster.client.generate(asked, max_tokens=8, temperature=0, timeout=5).token_ids == wanted
            assert _resident_kib(cluster) - kib < MOST_KIB * CONNECTIONS
        cluster.wait_for(lambda: _open_files(cluster) <= files + 4, 30)
        assert cluster.client.generate(asked, max_tokens=8, temperature=0, timeout=5).token_ids == wanted
        cluster.assert_blocks_home()


def _open_files(cluster: Cluster) -> int:
    return len(list(Path(f"/proc/{cluster.processes['router-0'].pid}/fd").iterdir()))


def _resident_kib(cluster: Cluster) -> int:
    status = Path(f"/proc/{cluster.processes['router-0'].pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])
