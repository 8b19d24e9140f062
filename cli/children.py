"""Child processes that are kept running."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

# A child that has died this often within this time would only die again.
MOST_DEATHS = 5
DEATHS_WITHIN_SECONDS = 60.0


@dataclass(slots=True)
class Child:
    """A process that dies with this one. After its death, `start` starts it again."""

    name: str
    command: list[str]
    output: IO[Any] = sys.stderr
    """Where its standard output and error go."""
    before_start: Callable[[], None] = lambda: None
    """Called before every start; raises if there is a reason not to."""
    process: subprocess.Popen[bytes] | None = None
    deaths: list[float] = field(default_factory=list)

    def start(self) -> None:
        self.before_start()
        # In a process group of its own: Ctrl-C at the terminal is for this process, which then stops its children.
        command = [sys.executable, "-m", "cli.bound_to_parent", str(os.getpid()), *self.command]
        # All its settings are flags: a variable meant for one part of the cluster must not reach the others.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TWOSTROKE_")}
        environment["PYTHONSAFEPATH"] = "1"  # or `python -m` would import the user's modules of the same names
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output, env=environment, process_group=0
        )

    def death(self) -> str | None:
        """How the process ended, in words; None while it runs."""
        code = self.process.poll() if self.process else None
        if code is None:
            return None
        self.deaths.append(time.monotonic())
        return f"was killed by {_name_of(-code)}" if code < 0 else f"ended with exit code {code}"

    @property
    def crash_loops(self) -> bool:
        since = time.monotonic() - DEATHS_WITHIN_SECONDS
        return sum(death > since for death in self.deaths) >= MOST_DEATHS

    def send(self, number: signal.Signals) -> None:
        if self.process:
            self.process.send_signal(number)  # which does nothing if it has ended

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


def _name_of(number: int) -> str:
    """Of a signal; most of the real-time ones have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
