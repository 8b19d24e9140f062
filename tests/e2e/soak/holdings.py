"""What a process holds, as the kernel sees it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

SHARED = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Holdings:
    files: int
    threads: int
    memory_mib: float  # anonymous: without pools, which are shared, and without files

    @classmethod
    def of(cls, pid: int) -> "Holdings":
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        return cls(
            files=len(os.listdir(f"/proc/{pid}/fd")),
            threads=int(status["Threads"]),
            memory_mib=int(status["RssAnon"].split()[0]) / 1024,
        )


def mapped_segments(pid: int) -> set[str]:
    """Names of the pools that the process maps, its own and its peers'; one that is unlinked ends in " (deleted)"."""
    return set(re.findall(r"/dev/shm/(twostroke-.*)$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE))
