"""What holds for every test."""

import gc
import signal
from contextlib import suppress

with suppress(ImportError):  # tests of kernels run without it, too
    from hypothesis import HealthCheck, settings

    # The same examples in every run, and no judgement of how fast the machine is.
    settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("suite")

with suppress(ImportError):
    import structlog

    # As the programs write them: structlog's own choice, where rich is installed, takes half a second for each.
    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*structlog.get_config()["processors"][:-1], plain])


def pytest_configure() -> None:
    """A shell's background job starts with Ctrl-C ignored, one under nohup with SIGHUP ignored, and each would hand
    that down to every program under test."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_finish() -> None:
    """Half a million objects of the modules under test are there to the end: Python's collector need not go through
    them again and again."""
    gc.collect()
    gc.freeze()
