"""When which part was not there, so that UNAVAILABLE can be told from a loss that nothing explains."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ROLES = ("prefill", "decode")

# A part that was stopped for nearly as long as it takes to be noticed is still listed when it goes on, and lost after.
AFTERMATH_SECONDS = 3.0


@dataclass(slots=True)
class _Outage:
    part: str
    since: float  # time.monotonic()
    until: float | None = None


class Outages:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outages: list[_Outage] = []

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """From what is done to a part until it serves again."""
        outage = _Outage(part, time.monotonic())
        with self._lock:
            self._outages.append(outage)
        try:
            yield
        finally:
            outage.until = time.monotonic() + AFTERMATH_SECONDS

    def explain(self, router: str, began: float, ended: float) -> bool:
        """Whether a request of this router could be UNAVAILABLE: the router was out, or a role had no worker left."""
        with self._lock:
            within = [o for o in self._outages if o.since <= ended and (o.until is None or o.until >= began)]
        return any(outage.part == router for outage in within) or any(_all_out(within, role) for role in ROLES)


def _all_out(outages: list[_Outage], role: str) -> bool:
    """Whether two workers of a role, which are all that there are, were out at once."""
    own = [outage for outage in outages if outage.part.startswith(role)]
    return any(
        first.part != second.part
        and (first.until is None or first.until >= second.since)
        and (second.until is None or second.until >= first.since)
        for first in own
        for second in own
    )
