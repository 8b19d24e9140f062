"""How much memory there is for a CPU worker, and what it asks of the C library's allocator."""

import ctypes
import platform
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

LARGEST_KEPT_BYTES = 1 << 30


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
    """Memory of this machine that processes can have. What caches files counts: the kernel gives it up when asked, and
    the model's own weights are in it."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kibibytes) << 10
