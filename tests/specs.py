"""Sequences as the router would send them, for tests of the workers."""

from collections.abc import Sequence

from common.prefix_hash import block_hashes, cache_root
from common.sampling import SamplingParams
from common.sequence import SequenceSpec

ROOT = cache_root("test-model", "")


def spec(
    tokens: Sequence[int],
    block_size: int,
    max_length: int = 1_000,
    sampling: SamplingParams | None = None,
    stop_token_ids: frozenset[int] = frozenset(),
) -> SequenceSpec:
    return SequenceSpec(
        token_ids=tuple(tokens),
        prompt_length=len(tokens),
        block_hashes=tuple(block_hashes(ROOT, tokens, block_size)),
        sampling=sampling or SamplingParams(temperature=0),
        max_length=max_length,
        stop_token_ids=stop_token_ids,
        cache_root=ROOT,
    )
