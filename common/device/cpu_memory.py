"""How much memory there is for a CPU worker, and what it asks of the C library's allocator."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

LARGEST_KEPT_BYTES = 1 << 30

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory instead of giving it back to the kernel.

    A forward pass allocates the same large tensors again and again. By default glibc maps each of them afresh, and the
    kernel zeroes every page when it is first touched. That took four fifths of the time of decode attention at batch
    16. Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if not kept:
        log.warning("the C library does not keep freed memory; steps will be slower")


def available_bytes() -> int:
    """Memory that this process can have, of the machine's and of what its control groups, such as a container's, allow
    it. What caches files counts: the kernel gives it up when asked, and the model's own weights are in it."""
    return max(min([_available_on_machine(), *_left_by_limits()]), 0)


def _available_on_machine() -> int:
    lines = (PROC / "meminfo").read_text(encoding="ascii").splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kibibytes) << 10


def _left_by_limits() -> Iterator[int]:
    """Of this process's control group, and of those around it. Version 2 only: with version 1 limits are not seen."""
    groups = (PROC / "self/cgroup").read_text(encoding="utf-8").splitlines()
    own = next((line.removeprefix("0::") for line in groups if line.startswith("0::")), "/")
    place = CGROUPS / own.strip("/")
    for group in (place, *place.parents):
        if not group.is_relative_to(CGROUPS):
            return
        with suppress(OSError):  # the machine's own group, and one that is not mounted here, have no such files
            limit = (group / "memory.max").read_text(encoding="ascii").strip()
            if limit == "max":
                continue
            used = int((group / "memory.current").read_text(encoding="ascii"))
            lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
            caches_files = sum(
                int(line.split()[1]) for line in lines if line.startswith(("active_file", "inactive_file"))
            )
            yield int(limit) - used + caches_files
