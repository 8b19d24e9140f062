"""How many files a process may have open: every connection is one."""

import resource
from contextlib import suppress


def allow_all() -> None:
    """Raises the soft limit, often 1,024 for the sake of programs that use select(2), to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError):  # macOS names no hard limit, and takes less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
