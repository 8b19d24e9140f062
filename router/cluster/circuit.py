"""A circuit breaker: when a worker that keeps failing gets no more attempts, and when it is tried again."""

import time
from collections.abc import Container

FAILURES = 3  # in a row
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds


class Circuit:
    """The circuit breaker of one worker's address. It outlives the worker's streams and restarts.

    Closed: attempts go there; `FAILURES` in a row open it. Open: for the length of a pause no attempts should go there.
    Half open: the next attempt is the probe, and others should stay away until it ends. Its success closes the circuit.
    Its failure begins another pause, twice as long. If it shows neither, the attempt after it is the probe.
    """

    def __init__(self) -> None:
        self.pause = 0.0  # seconds of the latest pause, which may be over; 0 while the circuit is closed
        self.probe: int | None = None  # id of that attempt
        self._failures = 0
        self._pause_ends = 0.0  # time.monotonic()

    @property
    def paused(self) -> bool:
        """Whether no attempt should go to the worker now, if another worker can take it."""
        return self.pause > 0 and (self.probe is not None or time.monotonic() < self._pause_ends)

    def begin(self, attempt_id: int) -> None:
        if self.pause and not self.paused:
            self.probe = attempt_id

    def succeeded(self, attempt_id: int) -> bool:
        """Returns whether this closes the circuit."""
        if not self.pause:
            self._failures = 0
            return False
        if self.probe != attempt_id:
            return False
        self._failures, self.pause, self.probe = 0, 0.0, None
        return True

    def failed(self, attempt_ids: Container[int]) -> float:
        """Counts one failure, of an attempt or of the worker with all its attempts. While the circuit is open only the
        probe's counts. Returns the seconds of the pause that begins with it; 0 if none does."""
        if not self.pause:
            self._failures += 1
            if self._failures < FAILURES:
                return 0.0
            self.pause = FIRST_PAUSE
        elif self.probe is not None and self.probe in attempt_ids:
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
        else:
            return 0.0
        self.probe = None
        self._pause_ends = time.monotonic() + self.pause
        return self.pause

    def ended(self, attempt_id: int) -> None:
        """The attempt is over, whether or not it counted as a success or a failure."""
        if self.probe == attempt_id:
            self.probe = None
