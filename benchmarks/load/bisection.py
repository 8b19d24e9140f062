"""The search for the highest rate that a cluster keeps up with."""

from dataclasses import dataclass


@dataclass(slots=True)
class Bisection:
    """Searches between two rates, without trying these two. If the highest rate is between them, then after N trials
    `best` is at most 1 / 2**N of their distance below it."""

    low: float
    high: float
    best: float | None = None  # the highest rate that was tried with success

    @property
    def rate(self) -> float:
        """The rate to try next."""
        return (self.low + self.high) / 2

    def tell(self, kept_up: bool) -> None:
        """Takes the result of trying `rate`."""
        if kept_up:
            self.best = self.low = self.rate
        else:
            self.high = self.rate
