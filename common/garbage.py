"""Keeps Python's garbage collector from pausing a service that answers within milliseconds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def none_in_imports() -> Iterator[None]:
    """Keeps the collector from looking for garbage in what is imported meanwhile, then and later.

    There is next to none in modules, and looking for it again and again as they grow is a quarter of what PyTorch's
    import takes.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def forget_start() -> None:
    """Takes everything that is there now out of the collector's sight. Call it once, when a part is ready.

    What start-up made stays to the end: going through it again and again (100 ms with torch's modules) would only make
    pauses.
    """
    gc.collect()
    gc.freeze()
