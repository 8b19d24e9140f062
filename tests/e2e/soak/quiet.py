"""What must hold at a quiet point, when nobody asks and every part is there: nothing is held, and nothing has grown."""

import re
import time
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from tests.e2e.cluster import Cluster
from tests.e2e.soak.holdings import SHARED, Holdings, mapped_segments

SETTLE_SECONDS = 10.0

# What a part may hold more of than the parts of its role did after the warm-up.
TOLERANCE = Holdings(files=4, threads=4, memory_mib=16.0)

# And a worker: it keeps code for each number of rows that it has multiplied (kernels/packed.py), and some come late.
TOLERANCE_OF_WORKERS = replace(TOLERANCE, memory_mib=48.0)

_HELD = re.compile(
    r"^twostroke_(?:queued|running|waiting|leases|(?:host_)?blocks\{state=\"(?:in_use|reserved)\"\}) (\S+)$",
    re.MULTILINE,
)


def settle(cluster: Cluster) -> None:
    """Raises AssertionError unless all blocks come home, as each router and each worker says."""
    cluster.wait_until_ready()
    for client in cluster.clients:
        cluster.assert_blocks_home(SETTLE_SECONDS, client)
    cluster.wait_for(lambda: not any(_held(port) for port in cluster.metrics_ports.values()), SETTLE_SECONDS)


def _held(port: int) -> float:
    """The sum of the gauges that tell of something held."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        held = [float(value) for value in _HELD.findall(page.read().decode())]
    assert held, "a part without gauges"
    return sum(held)


def holdings(cluster: Cluster) -> dict[str, Holdings]:
    return {part: Holdings.of(process.pid) for part, process in cluster.processes.items()}


def segments_left(cluster: Cluster, of_the_dead: Iterable[str]) -> list[str]:
    """Pools of parts that are no more which are still there, as a name or as a mapping; the last are looked for until
    their readers had time to let go of them."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        mapped = {name for process in cluster.processes.values() for name in mapped_segments(process.pid)}
        gone = [name for name in mapped if name.endswith("(deleted)")]
        left = [name for name in set(of_the_dead) - mapped if Path(SHARED, name).exists()]
        if not (gone or left) or time.monotonic() > deadline:
            return gone + left
        time.sleep(0.2)


def grown(now: Mapping[str, Holdings], before: Mapping[str, Holdings]) -> list[str]:
    """Sentences on the parts that hold more than those of their role did `before`, beyond the tolerance."""
    sentences = []
    for part, held in now.items():
        role = part.rpartition("-")[0]
        tolerance = TOLERANCE if role == "router" else TOLERANCE_OF_WORKERS
        own = [other for name, other in before.items() if name.startswith(role)]
        for what in ("files", "threads", "memory_mib"):
            most = max(getattr(other, what) for other in own) + getattr(tolerance, what)
            if getattr(held, what) > most:
                sentences.append(f"{part} holds {what} {getattr(held, what):g}, more than {most:g}")
    return sentences
