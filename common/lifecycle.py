"""How a worker ends: SIGTERM lets running work finish within a limit, Ctrl-C (SIGINT) and a second SIGTERM do not."""

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

import structlog

log = structlog.get_logger(__name__)


def end_in_order() -> None:
    """Until there is a `Lifecycle`, SIGTERM ends the process as Ctrl-C does, by an exception: what is to be done at
    exit is done, and no pool stays in /dev/shm."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


class Lifecycle:
    """Turns signals into two questions that the engine's loop asks every turn. The handlers log nothing: when a signal
    comes, the main thread may be logging, and hold the log's lock.

    Args:
        refuse: tells whoever asks that nothing new is taken; called from the signal handler, before anything else.
        wake: ends the loop's wait for messages; called from the signal handler.
        drain_seconds: how long running work may take after SIGTERM.
    """

    def __init__(self, refuse: Callable[[], None], wake: Callable[[], None], drain_seconds: float) -> None:
        self._refuse = refuse
        self._wake = wake
        self._drain_seconds = drain_seconds
        self._deadline: float | None = None
        self._unsaid = False  # that it drains
        signal.signal(signal.SIGTERM, self._drain)
        signal.signal(signal.SIGINT, self._stop)

    @property
    def draining(self) -> bool:
        return self._deadline is not None

    def over(self, idle: bool) -> bool:
        """Whether the loop should end now; `idle` says that no work is left."""
        if self._unsaid:
            self._unsaid = False
            log.info("draining", seconds=self._drain_seconds)
        return self._deadline is not None and (idle or time.monotonic() >= self._deadline)

    def _drain(self, number: int, frame: FrameType | None) -> None:
        if self.draining:
            self._stop(number, frame)
            return
        self._refuse()
        self._deadline = time.monotonic() + self._drain_seconds
        self._unsaid = True
        self._wake()

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._deadline = time.monotonic()
        self._wake()
