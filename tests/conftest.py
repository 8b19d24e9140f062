"""What holds for every test."""

import gc
import signal


def pytest_configure() -> None:
    """A shell's background job starts with Ctrl-C ignored, and would hand that down to every program under test."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Half a million objects of the modules under test are there to the end: Python's collector need not go through
    them again and again."""
    gc.collect()
    gc.freeze()
