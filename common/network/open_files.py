"""How many files a process may have open; every connection is one."""

import resource
from contextlib import suppress


def allow_all() -> None:
    """Raises the soft limit to the hard one. It is often 1,024, for the sake of programs that use select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError):  # macOS has no hard limit, but does not take infinity
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
