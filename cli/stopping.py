"""How a cluster of child processes is stopped, and by which signals."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from cli.children import Child
from common.signals import ending_signals, ignore_hangups

STOP_SECONDS = 5.0
HURRY_SECONDS = 3.0


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGHUP (where it is not ignored) in a list instead of being ended by them."""
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, *ending_signals())}
    try:
        yield signals
    finally:
        for handled, handler in previous.items():
            signal.signal(handled, handler)


def stop(stages: Iterable[list[Child]], seconds: float, signals: list[int]) -> None:
    """Stops one stage after another; another SIGTERM or Ctrl-C meanwhile hurries it.

    Args:
        stages: the router comes before the workers, so that requests can finish.
        seconds: how long each stage may take.
        signals: the list of `stop_signals`.
    """
    ignore_hangups()
    received = len(signals)
    for children in stages:
        for child in children:
            child.send(signal.SIGTERM)
        _wait_for(children, seconds, lambda: len(signals) > received)
        # A second SIGTERM ends a part at once but in order. Killed, a worker would leave its shared memory behind.
        for child in children:
            child.send(signal.SIGTERM)
        _wait_for(children, HURRY_SECONDS)
        for child in children:
            child.send(signal.SIGKILL)
        for child in children:
            if child.process:
                child.process.wait()


def _wait_for(children: Iterable[Child], seconds: float, hurried: Callable[[], bool] = lambda: False) -> None:
    """Returns when all have ended, the time is up, or `hurried` says so."""
    deadline = time.monotonic() + seconds
    while any(child.running for child in children) and time.monotonic() < deadline and not hurried():
        time.sleep(0.02)


def end_command(command: subprocess.Popen[bytes]) -> int:
    """Stops the command and returns its exit code."""
    command.terminate()
    try:
        code = command.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        command.kill()
        code = command.wait()
    return code if code >= 0 else 128 - code
