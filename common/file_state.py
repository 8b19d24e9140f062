"""Whether a file is still the one that was read."""

import os
from pathlib import Path

State = tuple[int, int, int]


def of(path: Path) -> State | None:
    """Differs whenever the file does; None while there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
