from pathlib import Path
from socket import create_server

import pytest

from common.network.free_port import free_port

RANGE_OF_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_no_port_is_given_out_twice_while_its_process_starts() -> None:
    ports = [free_port() for _ in range(100)]
    assert len(set(ports)) == 100
    assert max(ports) < int(RANGE_OF_CONNECTIONS.read_text().split()[0])


def test_ports_that_somebody_listens_on_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free = free_port(), free_port()
    draws = iter([taken, free])
    monkeypatch.setattr("random.SystemRandom.choice", lambda _self, _ports: next(draws))
    monkeypatch.setattr("common.network.free_port._given", [])
    with create_server(("127.0.0.1", taken)):
        assert free_port() == free


def test_an_address_of_another_machine() -> None:
    with pytest.raises(OSError, match="Cannot assign requested address"):
        free_port("192.0.2.1")
