"""How a worker ends: after SIGTERM, or SIGHUP as its terminal is closed, running work may finish, within a limit; after
Ctrl-C (SIGINT), or a second SIGTERM, it may not."""

import signal
import time
from collections.abc import Callable
from types import FrameType

import structlog

from common.signals import ending_signals, ignore_hangups

log = structlog.get_logger(__name__)


class Lifecycle:
    """Turns signals into `draining` and `over`, which the engine's loop asks every turn.

    The handlers log nothing: the main thread may hold the log's lock when a signal comes.

    Args:
        refuse: makes health say that no new work is taken; called first, from the signal handler.
        wake: ends the loop's wait for messages; called from the signal handler.
        drain_seconds: how long running work may take after the first signal.
    """

    def __init__(self, refuse: Callable[[], None], wake: Callable[[], None], drain_seconds: float) -> None:
        self._refuse = refuse
        self._wake = wake
        self._drain_seconds = drain_seconds
        self._deadline: float | None = None
        self._log_draining = False
        for number in ending_signals():
            signal.signal(number, self._drain)
        signal.signal(signal.SIGINT, self._stop)

    @property
    def draining(self) -> bool:
        return self._deadline is not None

    def over(self, idle: bool) -> bool:
        """Whether the loop should end now; `idle`: no work is left."""
        if self._log_draining:
            self._log_draining = False
            log.info("draining", seconds=self._drain_seconds)
        return self._deadline is not None and (idle or time.monotonic() >= self._deadline)

    def _drain(self, number: int, frame: FrameType | None) -> None:
        if self.draining:
            self._stop(number, frame)
            return
        ignore_hangups()
        self._refuse()
        self._deadline = time.monotonic() + self._drain_seconds
        self._log_draining = True
        self._wake()

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._deadline = time.monotonic()
        self._wake()
