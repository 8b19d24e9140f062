"""Settings of a decode worker; their docstrings are the help of the command line."""

from dataclasses import dataclass
from typing import Annotated, TypeAlias

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveInt
from cyclopts.validators import Number

from common.worker.config import WorkerConfig

Drafts: TypeAlias = Annotated[int, Parameter(validator=Number(gte=0, lte=15))]


@dataclass(frozen=True, slots=True)
class DecodeConfig(WorkerConfig):
    """Settings of a decode worker."""

    max_batch: PositiveInt = 64
    """Most sequences in a decode step."""

    draft_tokens: Drafts = 0
    """Speculative decoding: tokens that are drafted behind each in steps of few sequences, as they followed before in
    the same prompt or answer, and kept if sampling gives them as well. 0: none."""

    prefill_tokens: NonNegativeInt = 0
    """Prompts with at most this many tokens uncached on this worker are prefilled here, without a hand-over. With this
    or --prefill-overflow-tokens above 0, so is any prompt while there is no prefill worker."""

    prefill_overflow_tokens: NonNegativeInt = 0
    """Prompts with at most this many uncached tokens are prefilled here, one at a time, while all prefill workers are
    busy. If this and --prefill-tokens are 0, no prompts are."""

    prefill_overflow_seconds: NonNegativeFloat = 0.0
    """Seconds after a request's arrival before that is done for it. 0: at once, for the shortest time to first token;
    about half of what that may be: no sooner than needed, for the steadiest tokens."""

    prefill_chunk_tokens: PositiveInt = 512
    """Most prompt tokens that are computed here between two decode steps."""
