"""Addresses in settings: host:port, checked as they are read."""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Any

from cyclopts import Parameter

ANY_HOST = ("0.0.0.0", "[::]")

_IP: dict[str, Callable[[str], object]] = {"ipv4": IPv4Address, "ipv6": IPv6Address}


def is_unix(address: str) -> bool:
    """Whether the address is that of a Unix socket, not a host and a port."""
    return address.startswith(("unix:", "unix-abstract:"))


def with_port(listen: str, port: int) -> str:
    """`listen` with the port that the server really got: another one if it asked for port 0."""
    return listen if is_unix(listen) else f"{listen.rpartition(':')[0]}:{port}"


def check_listen(_type: Any, address: str) -> None:
    """Raises ValueError, with a sentence, for an address that cannot be listened on. Port 0 stands for a free one."""
    _check(address, lowest_port=0)


def check_target(_type: Any, address: str | None) -> None:
    """Raises ValueError, with a sentence, for an address that cannot be called. None: no address is set."""
    if address is not None:
        _check(address, lowest_port=1)


def check_targets(type_: Any, address: str) -> None:
    """As `check_target`; gRPC's lists of IP addresses pass as well, such as ipv4:10.0.0.1:8600,10.0.0.2:8600."""
    scheme, _, listed = address.partition(":")
    if scheme not in _IP:
        if "," in address:
            raise ValueError("Must be host:port; a list is written ipv4:10.0.0.1:8600,10.0.0.2:8600, or ipv6:...")
        check_target(type_, address)
        return
    for one in listed.split(","):
        check_target(type_, one)
        host = one.rpartition(":")[0].removeprefix("[").removesuffix("]")
        try:
            _IP[scheme](host)
        except ValueError as error:
            raise ValueError(f"Must be host:port; in a list, each host is an {scheme} address.") from error


def _check(address: str, lowest_port: int) -> None:
    if is_unix(address):
        return
    if address.startswith(("http://", "https://")):
        raise ValueError("Must be host:port, without http:// or https://.")
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and len(port) <= 5 and lowest_port <= int(port) < 1 << 16):
        raise ValueError(f"Must be host:port, with a port from {lowest_port} to 65535.")
    if ":" in host and "/" not in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError("Must be host:port, with brackets around an IPv6 address: [::1]:8600.")
    try:
        host.encode("idna")  # as a look-up of the name would do first
    except UnicodeError as error:
        raise ValueError("Must be host:port; no host can have this name.") from error


Listen = Annotated[str, Parameter(validator=check_listen)]
Target = Annotated[str, Parameter(validator=check_target)]
Targets = Annotated[str, Parameter(validator=check_targets)]
