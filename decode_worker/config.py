"""Settings of a decode worker; their docstrings are the help of the command line."""

from dataclasses import dataclass

from common.config import WorkerConfig


@dataclass(frozen=True, slots=True)
class DecodeConfig(WorkerConfig):
    """Settings of a decode worker."""

    max_batch: int = 64
    """Most sequences that are decoded together."""

    prefill_tokens: int = 0
    """Prompts that lack at most so many tokens in this worker's cache are prefilled here and not handed over, and any
    prompt while there is no prefill worker."""

    prefill_overflow_tokens: int = 0
    """Prompts that lack at most so many are prefilled here while all prefill workers have enough to do, one at a time.
    0, here and for --prefill-tokens: none, ever."""

    prefill_chunk_tokens: int = 512
    """Most tokens of prompts that are computed here between two decode steps."""
