"""Settings of a decode worker; their docstrings are the help of the command line."""

from dataclasses import dataclass

from common.config import WorkerConfig


@dataclass(frozen=True, slots=True)
class DecodeConfig(WorkerConfig):
    """Settings of a decode worker."""

    max_batch: int = 64
    """Most sequences that are decoded together."""
