"""What is done to the parts of a cluster, drawn from a seed."""

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tests.e2e.cluster import START_SECONDS, Cluster
from tests.e2e.soak.holdings import mapped_segments
from tests.e2e.soak.outages import ROLES, Outages
from twostroke import TwostrokeError

# A drain waits for the answers under way; no answer of a soak takes long.
DRAIN_SECONDS = 40.0

# Beyond four seconds a stopped part is taken for gone; both happens.
LONGEST_STOP_SECONDS = 8.0


@dataclass
class Hand:
    """Does one thing after the other to its own parts. What it does, and in which order, is its `rng`'s alone."""

    cluster: Cluster
    parts: Sequence[str]
    faults: Sequence[str]  # of "kill", "drain" and "stop"
    pause_seconds: tuple[float, float]
    outages: Outages
    rng: random.Random
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # by part and fault
    segments: set[str] = field(default_factory=set)  # of the parts that are no more
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pause = self.rng.uniform(*self.pause_seconds)

    def run(self, over: threading.Event) -> None:
        while not over.wait(self._pause):
            self._harm(self.rng.choice(self.parts), self.rng.choice(self.faults))
            self._pause = self.rng.uniform(*self.pause_seconds)

    def _harm(self, part: str, fault: str) -> None:
        process = self.cluster.processes[part]
        if (code := process.poll()) is not None:
            self.problems.append(f"{part} had ended by itself, with {code}")
            self._start(part)
            process = self.cluster.processes[part]
        with self.outages.of(part):
            if fault == "stop":
                process.send_signal(signal.SIGSTOP)
                time.sleep(self.rng.uniform(0.1, LONGEST_STOP_SECONDS))
                process.send_signal(signal.SIGCONT)
            else:
                self.segments |= mapped_segments(process.pid)
                process.send_signal(signal.SIGKILL if fault == "kill" else signal.SIGTERM)
                ended_with = process.wait(DRAIN_SECONDS)
                if fault == "drain" and ended_with != 0:
                    self.problems.append(f"{part} drained, and ended with {ended_with}")
                time.sleep(self.rng.uniform(0, 1))
                self._start(part)
            self._wait_until_known(part)
        self.counts[part, fault] += 1

    def _start(self, part: str) -> None:
        role, _, index = part.rpartition("-")
        if role == "router":
            self.cluster.start_router(int(index))
        else:
            self.cluster.start_worker(role, int(index))

    def _wait_until_known(self, part: str) -> None:
        """Returns when the part serves again, at every router where it is a worker."""
        role, _, index = part.rpartition("-")
        if role == "router":
            client = self.cluster.clients[int(index)]
            self._wait_for(lambda: all(self.cluster.workers(worker, client) for worker in ROLES))
        else:
            address = self.cluster.addresses(role)[part]
            self._wait_for(
                lambda: all(
                    any(worker.address == address for worker in self.cluster.workers(role, client))
                    for client in self.cluster.clients
                )
            )

    def _wait_for(self, known: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with suppress(TwostrokeError):
                if known():
                    return
            time.sleep(0.05)
        raise TimeoutError(f"{START_SECONDS:g} s were not enough for a part to be known again")
