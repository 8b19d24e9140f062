"""Ports for processes that are about to start."""

import errno
import os
import random
import socket
from collections import deque
from pathlib import Path

# A process takes seconds from here until it listens. Others that look for ports meanwhile look elsewhere: each process
# among the ports of its own remainder, and not among those that it gave out last.
_REMAINDERS = 64
_given: deque[int] = deque(maxlen=100)


def free_port(host: str = "127.0.0.1") -> int:
    """A free port of an address of this machine, from below the range that outgoing connections and servers on port 0
    use: one of those could take any other port before it is listened on.

    Raises:
        OSError: nothing can listen at this address.
    """
    first_of_connections = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(first_of_connections // 2 + os.getpid() % _REMAINDERS, first_of_connections, _REMAINDERS)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        port = random.SystemRandom().choice(candidates)
        if port not in _given and _is_free(host, port, family):
            _given.append(port)
            return port


def _is_free(host: str, port: int, family: socket.AddressFamily) -> bool:
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True
