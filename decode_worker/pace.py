"""When to launch the next decode step: as late as possible, so that sequences that arrive meanwhile can join it, yet
early enough that the GPU does not wait.

A step that has been launched behind the running one is closed: a sequence that arrives just after its launch waits for
two steps instead of one.
"""

from collections import deque

# Seconds from the launch of a step to the end of the one before it. How long a launch takes is found by trying: a late
# one doubles the lead, each timely one shortens it a little, so about one launch in 70 is late.
SHORTEST_LEAD = 0.001
LATE_FACTOR, IN_TIME_FACTOR = 2.0, 0.99

# Steps that are remembered. With another process on the same GPU, some of them take twice as long.
REMEMBERED = 8


class Pace:
    """Is told of the steps of a device in the order in which they run. All times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._lead = SHORTEST_LEAD
        self._past: deque[tuple[float, int]] = deque([(0.0, 1)], maxlen=REMEMBERED)  # seconds and rows
        self._began = 0.0
        self._rows = 0
        self._expected = 0.0

    def begins(self, now: float, rows: int) -> None:
        """A step of `rows` rows starts on the device now, or very soon."""
        self._began = now
        self._rows = rows
        # The shortest of the last steps counts, less if rows have left since: launching early costs the GPU nothing.
        self._expected = min(seconds * min(1.0, rows / before) for seconds, before in self._past)

    def ended(self, seconds: float) -> None:
        """The step that began last took this long."""
        self._past.append((seconds, self._rows))

    def launched(self, late: bool) -> None:
        """A step was launched behind the running one, which was already over if `late`."""
        longest = max(self._expected, SHORTEST_LEAD)  # as soon as the step before begins
        factor = LATE_FACTOR if late else IN_TIME_FACTOR
        self._lead = min(max(self._lead * factor, SHORTEST_LEAD), longest)

    def spare(self, now: float) -> float:
        """Seconds until the next step should be launched; 0 if it is time."""
        return max(self._began + self._expected - self._lead - now, 0.0)
