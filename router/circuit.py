"""When a worker that keeps failing is left alone, and when it is tried again."""

import time
from collections.abc import Container

FAILURES = 3  # in a row
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds


class Circuit:
    """A breaker between the router and one worker's address; it outlives the worker's streams and restarts.

    Closed: attempts go there, and `FAILURES` of them in a row that failed open it. Open: nothing should go there for a
    while. Then it is half open: one attempt is the probe. If that does well the circuit is closed, if it fails the
    pause begins again and is twice as long, and if it says nothing either way, the next attempt is the probe.
    """

    def __init__(self) -> None:
        self.pause = 0.0  # seconds that the last one took, or takes; 0 while it is closed
        self.probe: int | None = None  # attempt
        self._failures = 0
        self._pause_ends = 0.0  # time.monotonic()

    @property
    def paused(self) -> bool:
        """Whether nothing more should go to the worker now."""
        return self.pause > 0 and (self.probe is not None or time.monotonic() < self._pause_ends)

    def begin(self, attempt_id: int) -> None:
        if self.pause and not self.paused:
            self.probe = attempt_id

    def succeeded(self, attempt_id: int) -> bool:
        """True where this closes the circuit."""
        if not self.pause:
            self._failures = 0
            return False
        if self.probe != attempt_id:
            return False
        self._failures, self.pause, self.probe = 0, 0.0, None
        return True

    def failed(self, attempt_ids: Container[int]) -> float:
        """Counts one failure, of one attempt or of the worker with all that it had; returns the seconds of the pause
        that this begins, 0 where it begins none. While the circuit is open, only the probe counts."""
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

    def left(self, attempt_id: int) -> None:
        """The attempt is over there, whether or not that said something of the worker."""
        if self.probe == attempt_id:
            self.probe = None
