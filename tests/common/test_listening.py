"""Whether an address can be listened on, and what is said where it cannot. The kernel's own answers, on loopback."""

import socket

import pytest

from common.network.free_port import free_port
from common.network.listening import check
from common.start_error import AddressError


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "0.0.0.0:0", "[::]:0", "unix:/no/matter"])
def test_free(address: str) -> None:
    check(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_taken(host: str) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as server:
        address = f"{host}:{server.getsockname()[1]}"
        with pytest.raises(AddressError, match=f"^cannot listen on {address}: the port is taken$"):
            check(address)
    check(address)


def test_left_by_a_connection_that_was_closed() -> None:
    with socket.create_server(("127.0.0.1", free_port())) as server:
        host, port = server.getsockname()
        with socket.create_connection((host, port)) as caller:
            server.accept()[0].close()  # this side first: the kernel remembers it for a minute
            assert caller.recv(1) == b""
    check(f"{host}:{port}")


def test_of_another_machine() -> None:
    with pytest.raises(AddressError, match=r"^cannot listen on 192\.0\.2\.1:8600: the host is not this machine$"):
        check("192.0.2.1:8600")


def test_of_no_machine() -> None:
    with pytest.raises(AddressError, match=r"^cannot listen on nobody\.invalid:8600: \w"):
        check("nobody.invalid:8600")
