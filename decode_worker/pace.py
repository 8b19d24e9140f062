"""When the next decode step is launched: so late that what arrives meanwhile is still in it, so early that the GPU does
not wait.

A step that lies behind another one is closed to newcomers: who arrives just after its launch waits for two steps, not
for one.
"""

from collections import deque

# Seconds between the launch of a step and the end of the one before it. What a launch really takes is found by trying:
# one that came too late doubles it, each that did not makes it a little shorter, so that about one in 70 is late.
SHORTEST_LEAD = 0.001
LATE_FACTOR, IN_TIME_FACTOR = 2.0, 0.99

# How many steps are looked back on. Where another process computes on the same GPU, some take twice as long.
REMEMBERED = 8


class Pace:
    """Steps of a batch on a device, in the order in which they run. Times are of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._lead = SHORTEST_LEAD
        self._past: deque[tuple[float, int]] = deque([(0.0, 1)], maxlen=REMEMBERED)  # seconds and rows
        self._began = 0.0
        self._rows = 0
        self._expected = 0.0

    def begins(self, now: float, rows: int) -> None:
        """A step of so many rows has the device from now on, or soon."""
        self._began = now
        self._rows = rows
        # As long as the shortest of late, less where rows have left: a launch too early costs the GPU nothing.
        self._expected = min(seconds * min(1.0, rows / before) for seconds, before in self._past)

    def ended(self, seconds: float) -> None:
        """The step that began last took so long."""
        self._past.append((seconds, self._rows))

    def launched(self, late: bool) -> None:
        """A step was launched behind the one that runs; `late`: that one was over by then."""
        longest = max(self._expected, SHORTEST_LEAD)  # sooner than at once is not possible
        factor = LATE_FACTOR if late else IN_TIME_FACTOR
        self._lead = min(max(self._lead * factor, SHORTEST_LEAD), longest)

    def spare(self, now: float) -> float:
        """Seconds until the next step should be launched; 0 where it is time."""
        return max(self._began + self._expected - self._lead - now, 0.0)
