"""Time that goes on only when the world says so."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


class Clock:
    """Called, it says what time it is, in seconds."""

    def __init__(self) -> None:
        self._now = 1_000.0  # 0 is long ago

    def __call__(self) -> float:
        return self._now

    def go_on(self, seconds: float) -> None:
        self._now += seconds

    @contextmanager
    def in_charge(self) -> Iterator[None]:
        """Until it is left, this process goes by it: event loops with their timers, and what grammars may use of the
        CPU, too. Dataclasses with a time as a default had the real clock when they were imported. They only trace and
        measure with it."""
        with mock.patch.multiple(time, monotonic=self, perf_counter=self, thread_time=self):
            yield
