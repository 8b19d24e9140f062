"""Ports for processes that are about to start."""

import os
import random
from collections import deque
from contextlib import suppress
from pathlib import Path
from socket import create_server

# A process takes seconds from here until it listens. Others that look for ports meanwhile look elsewhere: each process
# among the ports of its own remainder, and not among those that it gave out last.
REMAINDERS = 64
_given: deque[int] = deque(maxlen=100)


def free_port() -> int:
    """A free port of 127.0.0.1 from below the range that outgoing connections use: one of those could take any other
    port before it is listened on."""
    first_of_connections = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(first_of_connections // 2 + os.getpid() % REMAINDERS, first_of_connections, REMAINDERS)
    while True:
        port = random.SystemRandom().choice(candidates)
        if port in _given:
            continue
        with suppress(OSError), create_server(("127.0.0.1", port)):
            _given.append(port)
            return port
