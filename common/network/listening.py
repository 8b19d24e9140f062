"""Whether an address can be listened on, and if not, why: gRPC only says that it failed."""

import errno
import socket

from common.network.addresses import ANY_HOST, is_unix
from common.start_error import AddressError

NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def check(address: str) -> None:
    """Checks that `address` (host:port) is free. If the host's name stands for several addresses, this machine must
    have one of them, and the port must be free at all that it has.

    Raises:
        AddressError: the port is taken, or the host is not this machine; the sentence says which.
    """
    if is_unix(address) or "/" in address:  # or with a scheme, which only gRPC understands
        return
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise AddressError(f"cannot listen on {address}: {error.strerror}") from error
    # gRPC takes either of these for all addresses of the machine, IPv4 and IPv6.
    here = host in ANY_HOST
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: old connections do no harm
                tried.bind(place)
            here = True
        except OSError as error:
            if error.errno not in NOT_HERE:
                reason = "the port is taken" if error.errno == errno.EADDRINUSE else error.strerror
                raise AddressError(f"cannot listen on {address}: {reason}") from error
    if not here:
        raise AddressError(f"cannot listen on {address}: the host is not this machine")
