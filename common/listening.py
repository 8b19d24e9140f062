"""Whether an address can be listened on, and why not: gRPC says only that it failed."""

import errno
import socket

from common.addresses import ANY_HOST, is_unix
from common.start_error import AddressError

NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def check(address: str) -> None:
    """
    Raises:
        AddressError: the port is taken, or the host is not this machine; its sentence says which. A name may stand for
            several addresses: the port must be free at all that this machine has, and it must have one.
    """
    if is_unix(address) or "/" in address:  # a name with a scheme, which gRPC alone knows
        return
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise AddressError(f"cannot listen on {address}: {error.strerror}") from error
    # gRPC takes either of these as all addresses of the machine, whatever family it has.
    here = host in ANY_HOST
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC: old connections are no matter
                tried.bind(place)
            here = True
        except OSError as error:
            if error.errno not in NOT_HERE:
                reason = "the port is taken" if error.errno == errno.EADDRINUSE else error.strerror
                raise AddressError(f"cannot listen on {address}: {reason}") from error
    if not here:
        raise AddressError(f"cannot listen on {address}: the host is not this machine")
