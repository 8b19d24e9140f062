"""Whether a file is still the one that was read."""

import os
from pathlib import Path

State = tuple[int, int, int]


def of(path: Path) -> State | None:
    """A value that changes whenever the file does; None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
