"""The memory that penalties, grammars and log-probabilities take of a GPU."""

import numpy as np
import pytest
import torch

from common.device.gpu_memory import SPECIAL_PART_BYTES, SPECIAL_ROW_BYTES
from common.sampling.guided_sampling import AllowedTokens
from common.sampling.parameters import SamplingParams
from common.sampling.special_sampling import TokenCounts, logprobs
from common.sequence import SequenceSpec
from tests.gpu.greedy import DEVICE

VOCAB = 151_936


@pytest.mark.parametrize("rows", [16, 100, 256])
def test_no_more_than_is_kept_free(rows: int) -> None:
    logits = torch.randn(rows, VOCAB, device=DEVICE).bfloat16()
    positions = torch.full((rows,), 5, device=DEVICE)
    params = SamplingParams(repetition_penalty=1.1, frequency_penalty=0.1, logit_bias=((7, 1.0),))
    spec = SequenceSpec((1, 2, 3), 3, (), params, 100, min_length=50, stop_token_ids=frozenset({9}))
    allowed = AllowedTokens([*range(rows)], np.full((rows, VOCAB // 32), -1, dtype=np.int32), {})
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    counts = TokenCounts(VOCAB, DEVICE)
    adjusted = counts.select([(row, counts.add(spec, (1, 2, 3)), spec) for row in range(rows)])
    restricted = allowed.restrict(counts.adjust(logits, positions, adjusted))
    tokens = restricted.argmax(-1).int()
    counts.record(tokens, adjusted)
    logprobs(logits, tokens, adjusted.rows, 20)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_reserved() - before
    kept = (rows * SPECIAL_ROW_BYTES + SPECIAL_PART_BYTES) * VOCAB
    assert taken <= kept, f"{taken >> 20} of {kept >> 20} MiB"
    assert kept < 2.5 * taken
