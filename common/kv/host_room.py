"""Whether the memory that `--host-cache-gib` asks for is there."""

from common.device import cpu_memory
from common.start_error import StartError

MOST_SHARE = 0.9  # of what is available; the rest is for whatever else a worker needs


class HostMemoryError(StartError):
    """So much memory of the host cannot be had. Its text is a sentence that says why and what to change."""


def check(gib: float, workers: int = 1) -> None:
    """Raises HostMemoryError if there are not `gib` GiB for each of so many workers."""
    available = cpu_memory.available_bytes()
    if workers * gib * 2**30 > MOST_SHARE * available:
        asked = f"--host-cache-gib {gib:g}" + (f" for each of {workers} workers" if workers > 1 else "")
        raise HostMemoryError(
            f"{asked} is more than nine tenths of the memory that is available, {available / 2**30:.1f} GiB; ask for "
            "less, or raise the limit of the container"
        )
