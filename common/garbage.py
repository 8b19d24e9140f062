"""Keeps Python's garbage collector from pausing a service that answers within milliseconds."""

import gc


def forget_start() -> None:
    """Takes everything that is there now out of the collector's sight. Call it once, when a part is ready.

    What start-up made stays to the end: going through it again and again (100 ms with torch's modules) would only make
    pauses.
    """
    gc.collect()
    gc.freeze()
