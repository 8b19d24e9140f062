"""Limits how much of what callers sent waits at one place."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from router.errors import Exhausted

MOST_OF_A_CALLER = 16 * 1024 * 1024
MOST = 4 * MOST_OF_A_CALLER  # of all callers


class WaitingBytes:
    """
    Args:
        full: what a caller is told for whom there is no room.
    """

    def __init__(self, full: str) -> None:
        self._full = full
        self._held: Counter[str] = Counter()  # by caller

    @property
    def total(self) -> int:
        return self._held.total()

    def add(self, caller: str, size: int) -> None:
        """
        Raises:
            Exhausted: too much waits already.
        """
        if self._held[caller] + size > MOST_OF_A_CALLER or self.total + size > MOST:
            raise Exhausted(self._full)
        self._held[caller] += size

    def remove(self, caller: str, size: int) -> None:
        self._held[caller] -= size

    @contextmanager
    def counted(self, caller: str, size: int) -> Iterator[None]:
        """So much waits during the block. Raises as `add`."""
        self.add(caller, size)
        try:
            yield
        finally:
            self.remove(caller, size)
