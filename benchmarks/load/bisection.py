"""The search for the highest rate that a cluster keeps up with."""

from dataclasses import dataclass


@dataclass(slots=True)
class Bisection:
    """Between two rates, neither of which is tried itself. After N trials `best` is within 1 / 2**N of their distance
    from the highest rate there is, where that lies between them."""

    low: float
    high: float
    best: float | None = None  # the highest rate that was tried with success

    @property
    def rate(self) -> float:
        """To be tried next."""
        return (self.low + self.high) / 2

    def tell(self, kept_up: bool) -> None:
        """What came of trying `rate`."""
        if kept_up:
            self.best = self.low = self.rate
        else:
            self.high = self.rate
