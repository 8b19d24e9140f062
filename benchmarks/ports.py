"""Ports for processes that are about to start."""

import random
from contextlib import suppress
from pathlib import Path
from socket import create_server


def free_port() -> int:
    """A free port of 127.0.0.1 from below the range that outgoing connections use: one of those could take any other
    port before it is listened on."""
    first_of_connections = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(first_of_connections // 2, first_of_connections)
        with suppress(OSError), create_server(("127.0.0.1", port)):
            return port
