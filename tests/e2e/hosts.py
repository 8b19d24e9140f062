"""Hosts of their own on one machine: network namespaces, each joined to this one by a wire that tests may slow down,
make lossy or cut. Their packets go through this process, so that no kernel module for it is needed."""

import fcntl
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000

_LONGEST_PACKET = 65_535


@dataclass
class Way:
    """One direction of a wire, and what happens to its packets. May be changed at any time, from any thread."""

    delay_seconds: float = 0.0
    loss: float = 0.0  # share of packets that vanish
    cut: bool = False  # all of them do
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def carry(self, source: int, target: int, over: int) -> None:
        """Moves packets between two devices until `over` is readable."""
        under_way: deque[tuple[float, bytes]] = deque()
        while True:
            wait = max(under_way[0][0] - time.monotonic(), 0) if under_way else None
            readable, _, _ = select.select([source, over], [], [], wait)
            if over in readable:
                return
            if source in readable:
                packet = os.read(source, _LONGEST_PACKET)
                if not self.cut and self.rng.random() >= self.loss:
                    under_way.append((time.monotonic() + self.delay_seconds, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, packet = under_way.popleft()
                if not self.cut:
                    os.write(target, packet)


class Host:
    """A network namespace for as long as a `with` lasts. Processes in it share everything else with this machine,
    /dev/shm with its pools included.

    Raises:
        OSError: it cannot be made here; the reason is in it.
    """

    def __enter__(self) -> Self:
        subnet = random.SystemRandom().randrange(1 << 15) << 2  # of 198.18.0.0/15, which is for tests of networks
        network = f"198.{18 + (subnet >> 16)}.{subnet >> 8 & 255}"
        self.here, self.address = f"{network}.{subnet % 256 + 1}", f"{network}.{subnet % 256 + 2}"
        self.name = f"twostroke-{subnet:x}"
        self.outward, self.inward = Way(), Way()  # from the host, to the host
        with ExitStack() as stack:
            _ip("netns", "add", self.name)
            stack.callback(_ip, "netns", "delete", self.name)
            near, far = f"ts-{subnet:x}-near", f"ts-{subnet:x}-far"
            devices = _tun(near, stack), _tun(far, stack)
            _ip("link", "set", far, "netns", self.name)
            _ip("address", "add", self.here, "peer", self.address, "dev", near)
            _ip("link", "set", near, "up")
            inside = ("-n", self.name)
            _ip(*inside, "address", "add", self.address, "peer", self.here, "dev", far)
            _ip(*inside, "link", "set", far, "up")
            _ip(*inside, "link", "set", "lo", "up")
            self._carry(*devices, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _carry(self, near: int, far: int, stack: ExitStack) -> None:
        over, end = os.pipe()
        stack.callback(os.close, over)
        for way, source, target in ((self.outward, far, near), (self.inward, near, far)):
            carrier = threading.Thread(target=way.carry, args=(source, target, over), daemon=True)
            carrier.start()
            stack.callback(carrier.join)
        stack.callback(os.close, end)  # the first to be done: it makes the other end readable

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs this one on the host; the process is its own, not a child of another."""
        return ["ip", "netns", "exec", self.name, *command]

    def cut(self) -> None:
        self.outward.cut = self.inward.cut = True

    def heal(self) -> None:
        """The wire is as new."""
        for way in (self.outward, self.inward):
            way.cut, way.delay_seconds, way.loss = False, 0.0, 0.0


def why_not() -> str:
    """Why no hosts can be made here; empty where they can."""
    try:
        with Host():
            return ""
    except OSError as error:
        return f"no network namespaces: {error}"


def _tun(name: str, stack: ExitStack) -> int:
    """Makes a device for IP packets; it lives as long as the file that is returned is open, and that as the stack."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, file)
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return file


def _ip(*arguments: str) -> None:
    ran = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {ran.stderr.strip()}")
