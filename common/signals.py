"""Signals that end a part: SIGTERM, SIGHUP as its terminal is closed, and Ctrl-C (SIGINT)."""

import signal
import sys


def ending_signals() -> tuple[signal.Signals, ...]:
    """Those that stop a part when running work is done: not SIGHUP where it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGHUP)


def ignore_hangups() -> None:
    """For a part that is stopping: SIGHUP does not hurry it. Where a session ends, systemd sends one right behind
    SIGTERM, and terminal and shell may send one each."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def end_in_order() -> None:
    """Makes these signals end the process by an exception, as Ctrl-C does, until something else handles them. So exit
    handlers run and leave no pool in /dev/shm."""
    for number in ending_signals():
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
