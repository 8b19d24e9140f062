"""At which address of this machine another part of the cluster reaches it."""

import asyncio
import ipaddress
import socket
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Way:
    """Where calls to a peer come from."""

    host: str  # this machine's, as it stands in an address
    same_machine: bool  # the peer is on this machine, too


async def way_to(target: str, family: socket.AddressFamily = socket.AF_UNSPEC) -> Way:
    """Asks the system from which address calls to `target` (host:port) would go out. Nothing is sent.

    Raises:
        OSError: the target's name cannot be looked up, or no route of this address family leads there.
    """
    host, _, port = target.rpartition("/")[2].rpartition(":")
    problem = OSError(f"no address of {target} can be called from here")
    for found, kind, _, _, address in await asyncio.get_running_loop().getaddrinfo(
        host.strip("[]"), port, family=family, type=socket.SOCK_DGRAM
    ):
        with socket.socket(found, kind) as probe:
            try:
                probe.connect(address)
            except OSError as error:
                problem = error
                continue
            own = probe.getsockname()[0]
        local = own == address[0] or ipaddress.ip_address(own).is_loopback
        return Way(f"[{own}]" if ":" in own else own, local)
    raise problem
