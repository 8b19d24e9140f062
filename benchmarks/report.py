"""Figures of a run: measured section by section, kept as JSON after each, printed as one table at the end."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. `ratio` compares the figure with what it is measured against. `bound` is the lowest ratio
    that is wanted, or the highest if `at_most`."""

    what: str
    measured: str
    against: str = ""
    ratio: float | None = None
    bound: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.ratio is None or self.bound is None:
            return None
        return self.ratio <= self.bound if self.at_most else self.ratio >= self.bound


@dataclass
class Report:
    """Goes on after a section that fails, and notes it."""

    path: Path | None
    figures: list[Figure] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def section(self, name: str, measure: Callable[[], Iterator[Figure]]) -> None:
        started = time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            for figure in measure():
                self.figures.append(figure)
                print(_line(figure), flush=True)
        except Exception:
            traceback.print_exc()
            self.failed.append(name)
        self.seconds[name] = round(time.perf_counter() - started, 2)
        self._write()

    def finish(self) -> int:
        """Prints everything. Returns the exit code: 1 if a section failed. A missed bound is no failure."""
        print(f"\n{_HEADER}")
        for figure in self.figures:
            print(_line(figure))
        print("seconds: " + ", ".join(f"{name} {seconds}" for name, seconds in self.seconds.items()))
        if self.failed:
            print(f"FAILED: {', '.join(self.failed)}")
        return 1 if self.failed else 0

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figures = [asdict(figure) | {"met": figure.met} for figure in self.figures]
        content = {"figures": figures, "failed": self.failed, "seconds": self.seconds}
        self.path.write_text(json.dumps(content, indent=1) + "\n")


_COLUMNS = "{:<52} {:>20} {:>22} {:>7} {:>9} {:>5}"
_HEADER = _COLUMNS.format("what", "measured", "against", "ratio", "wanted", "met")


def _line(figure: Figure) -> str:
    ratio = "" if figure.ratio is None else f"{figure.ratio:.3f}"
    wanted = "" if figure.bound is None else f"{'≤' if figure.at_most else '≥'} {figure.bound:g}"
    met = {True: "yes", False: "NO", None: ""}[figure.met]
    return _COLUMNS.format(figure.what, figure.measured, figure.against, ratio, wanted, met)
