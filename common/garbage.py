"""Keeps Python's garbage collector from pausing a service that answers within milliseconds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def none_in_imports() -> Iterator[None]:
    """Keeps the collector away from whatever is imported meanwhile, now and later.

    Modules hold next to no garbage, and looking for it again and again takes a quarter of PyTorch's import time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def forget_start() -> None:
    """Hides everything that exists now from the collector. Call it once, when a part is ready.

    What start-up made stays until the end, and going through it takes 100 ms with torch's modules: a pause each time.
    """
    gc.collect()
    gc.freeze()
