"""Settings of a prefill worker; their docstrings are the help of the command line."""

from dataclasses import dataclass

from cyclopts.types import PositiveFloat, PositiveInt

from common.worker.config import WorkerConfig


@dataclass(frozen=True, slots=True)
class PrefillConfig(WorkerConfig):
    """Settings of a prefill worker."""

    max_batch_tokens: PositiveInt | None = None
    """Most tokens in one forward pass; longer prompts are cut into chunks. Not set: 2,048 on a GPU, 512 on a CPU."""

    lease_seconds: PositiveFloat = 30.0
    """Seconds that a finished prompt's blocks are held for a decode worker: long enough for a busy one to take them,
    short enough that blocks come home when nobody does."""
