"""What goes wrong in a cluster: workers die or are told to drain, streams break on either side."""

import random
from collections import Counter
from collections.abc import Sequence

from tests.simulation.host import Host
from tests.simulation.link import Link


def strike(hosts: Sequence[Host], links: Sequence[Link], counts: Counter[str], rng: random.Random) -> None:
    """Seldom does anything."""
    if hosts and rng.random() < 0.006:
        rng.choice(hosts).dead = True
        counts["workers killed"] += 1
    if hosts and rng.random() < 0.006:
        rng.choice(hosts).draining = True
        counts["workers drained"] += 1
    if links and rng.random() < 0.02:
        link = rng.choice(links)
        link.close_router() if rng.random() < 0.5 else link.close_worker()
        counts["streams cut"] += 1
