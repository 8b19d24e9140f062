"""How a worker ends: after SIGTERM, or SIGHUP as its terminal is closed, running work may finish, within a limit; after
Ctrl-C (SIGINT), or a second SIGTERM, it may not."""

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

import structlog

log = structlog.get_logger(__name__)


def stopping() -> tuple[signal.Signals, ...]:
    """The signals that stop a part when running work is done: not SIGHUP where it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGHUP)


def ignore_hangups() -> None:
    """For a part that is stopping: SIGHUP does not hurry it. Where a session ends, systemd sends one right behind
    SIGTERM, and terminal and shell may send one each."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def end_in_order() -> None:
    """Makes these signals end the process by an exception, as Ctrl-C does, until there is a `Lifecycle`. So exit
    handlers run and leave no pool in /dev/shm."""
    for number in stopping():
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))


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
        for number in stopping():
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
