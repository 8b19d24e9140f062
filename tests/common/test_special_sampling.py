"""Penalties, biases, minimum lengths and log-probabilities against transformers' logits processors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from common.sampling.parameters import SamplingParams
from common.sampling.special_sampling import (
    ROWS_AT_ONCE,
    TokenCounts,
    logprobs,
    wants_adjusting,
    wants_logprobs,
    warm_up,
)
from common.sequence import SequenceSpec
from kernels import sampling

VOCAB = 60
CPU = torch.device("cpu")
PROMPT = (3, 3, 17, 42)
OUTPUT = (5, 17, 5, 59)
PLAIN = SequenceSpec(
    token_ids=PROMPT, prompt_length=len(PROMPT), block_hashes=(), sampling=SamplingParams(), max_length=100
)


def _with(**params: Any) -> SequenceSpec:
    return replace(PLAIN, sampling=SamplingParams(**params))


def _logits(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def _adjusted(spec: SequenceSpec, tokens: tuple[int, ...], logits: torch.Tensor) -> torch.Tensor:
    counts = TokenCounts(VOCAB, CPU)
    rows = counts.select([(0, counts.add(spec, tokens), spec)])
    return counts.adjust(logits, torch.tensor([len(tokens)]), rows)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + OUTPUT]), _logits())
    torch.testing.assert_close(_adjusted(_with(repetition_penalty=penalty), PROMPT + OUTPUT, _logits()), theirs)


def test_logit_bias_is_transformers() -> None:
    bias = {0: -4.0, 17: 2.5, 59: -100.0}
    theirs = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])(
        torch.tensor([PROMPT]), _logits()
    )
    torch.testing.assert_close(_adjusted(_with(logit_bias=tuple(bias.items())), PROMPT, _logits()), theirs)


@pytest.mark.parametrize("sampled", [0, 3, 4])
def test_minimum_length_is_transformers(sampled: int) -> None:
    spec = replace(PLAIN, min_length=len(PROMPT) + 4, stop_token_ids=frozenset({2, 9}))
    tokens = PROMPT + OUTPUT[:sampled]
    theirs = MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, [2, 9])(torch.tensor([tokens]), _logits())
    assert torch.equal(_adjusted(spec, tokens, _logits()), theirs)
    assert wants_adjusting(spec, len(tokens)) == (sampled < 4)


def test_presence_and_frequency_count_the_output_only() -> None:
    change = _adjusted(_with(presence_penalty=0.5, frequency_penalty=0.25), PROMPT + OUTPUT, _logits()) - _logits()
    expected = torch.zeros(VOCAB)
    expected[[5, 17, 59]] = torch.tensor([-1.0, -0.75, -0.75])
    torch.testing.assert_close(change[0], expected)


def test_everything_at_once_in_the_stated_order() -> None:
    spec = replace(
        _with(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((5, 10.0), (3, 1.0))),
        min_length=50,
        stop_token_ids=frozenset({42}),
    )
    logits = torch.full((1, VOCAB), 4.0)
    adjusted = _adjusted(spec, PROMPT + OUTPUT, logits)[0]
    assert adjusted[5] == 4.0 / 2 - 0.5 - 2 * 0.25 + 10.0
    assert adjusted[3] == 4.0 / 2 + 1.0
    assert adjusted[42] == -torch.inf
    assert adjusted[0] == 4.0
    assert logits.eq(4.0).all()


def test_tokens_recorded_on_the_device_count_like_those_given_at_first() -> None:
    specs = [
        _with(repetition_penalty=1.5, frequency_penalty=0.3),
        _with(logit_bias=((1, 5.0),)),
        _with(presence_penalty=-1.0),
    ]
    logits, positions = _logits(5), torch.full((5,), 9)
    stepped, at_once = TokenCounts(VOCAB, CPU), TokenCounts(VOCAB, CPU)
    batch_rows = (4, 0, 2)
    rows = stepped.select([(row, stepped.add(spec, PROMPT), spec) for row, spec in zip(batch_rows, specs, strict=True)])
    for token in OUTPUT:
        stepped.record(torch.tensor([token, 50, token, 51, token], dtype=torch.int32), rows)
    expected = at_once.select(
        [(row, at_once.add(spec, PROMPT + OUTPUT), spec) for row, spec in zip(batch_rows, specs, strict=True)]
    )
    adjusted = stepped.adjust(logits, positions, rows)
    assert torch.equal(adjusted, at_once.adjust(logits, positions, expected))
    assert torch.equal(adjusted[[1, 3]], logits[[1, 3]])
    assert not torch.equal(adjusted[4], logits[4])


def test_a_slot_is_clean_for_its_next_sequence_and_the_table_grows() -> None:
    counts = TokenCounts(VOCAB, CPU)
    spec = _with(repetition_penalty=3.0, presence_penalty=2.0)
    slots = [counts.add(spec, PROMPT + OUTPUT) for _ in range(9)]
    assert len(set(slots)) == 9
    counts.remove(slots[3])
    fresh = replace(spec, token_ids=(8,), prompt_length=1)
    slot = counts.add(fresh, (8,))
    changed = counts.adjust(_logits(), torch.tensor([1]), counts.select([(0, slot, fresh)])) != _logits()
    assert changed.nonzero().tolist() == [[0, 8]]
    kept = counts.adjust(_logits(), torch.tensor([8]), counts.select([(0, slots[8], spec)]))
    assert torch.equal(kept, _adjusted(spec, PROMPT + OUTPUT, _logits()))


def test_rows_of_unlike_sequences_do_not_touch_each_other() -> None:
    specs = [
        replace(PLAIN, min_length=50, stop_token_ids=frozenset({7})),
        replace(PLAIN, min_length=50, stop_token_ids=frozenset({8, 9, 10})),
        _with(logit_bias=((0, 1.0), (1, 1.0))),
        _with(logit_bias=((2, -1.0),)),
    ]
    counts = TokenCounts(VOCAB, CPU)
    rows = counts.select([(row, counts.add(spec, PROMPT), spec) for row, spec in enumerate(specs)])
    together = counts.adjust(_logits(4), torch.full((4,), len(PROMPT)), rows)
    alone = [_adjusted(spec, PROMPT, _logits(4)[row : row + 1]) for row, spec in enumerate(specs)]
    assert torch.equal(together, torch.cat(alone))


def test_many_rows_are_adjusted_as_each_is_alone() -> None:
    specs = [
        _with(repetition_penalty=1 + row / 20, logit_bias=((row % VOCAB, 2.0),)) for row in range(2 * ROWS_AT_ONCE + 3)
    ]
    counts, logits = TokenCounts(VOCAB, CPU), _logits(len(specs) + 1)
    rows = counts.select([(row, counts.add(spec, PROMPT), spec) for row, spec in enumerate(specs)])
    together = counts.adjust(logits, torch.full((len(logits),), len(PROMPT)), rows)
    alone = [_adjusted(spec, PROMPT, logits[row : row + 1]) for row, spec in enumerate(specs)]
    assert torch.equal(together, torch.cat([*alone, logits[-1:]]))


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = _logits(4).half()
    tokens, rows = torch.tensor([1, 2, 3, 4], dtype=torch.int32), torch.tensor([3, 1])
    found = logprobs(logits, tokens, rows, top=5)
    expected = logits.float().log_softmax(-1)
    torch.testing.assert_close(found.tokens, torch.stack([expected[3, 4], expected[1, 2]]))
    values, ids = expected[[3, 1]].sort(descending=True)
    torch.testing.assert_close(found.top, values[:, :5])
    assert torch.equal(found.top_ids, ids[:, :5])
    assert logprobs(logits, tokens, rows, top=0).top_ids.shape == (2, 0)


def test_logprobs_of_many_rows_are_those_of_each() -> None:
    logits, count = _logits(100), 2 * ROWS_AT_ONCE + 3
    tokens, rows = (
        torch.arange(100).int() % VOCAB,
        torch.randperm(100, generator=torch.Generator().manual_seed(2))[:count],
    )
    found = logprobs(logits, tokens, rows, top=3)
    expected = logits.log_softmax(-1)[rows]
    torch.testing.assert_close(found.tokens, expected.gather(1, tokens[rows].long()[:, None])[:, 0])
    torch.testing.assert_close(found.top, expected.topk(3).values)
    assert torch.equal(found.top_ids, expected.topk(3).indices)


def test_plain_sequences_want_nothing() -> None:
    assert not wants_adjusting(PLAIN, 4)
    assert not wants_logprobs(PLAIN)
    assert not wants_adjusting(replace(PLAIN, stop_token_ids=frozenset({2})), 4)
    assert wants_logprobs(_with(logprobs=0))
    for params in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"logit_bias": ((1, 1.0),)}):
        assert wants_adjusting(_with(**params), 4)


def test_warming_up_samples_adjusted_logits_of_few_rows_and_of_many() -> None:
    sampled: list[tuple[int, torch.dtype]] = []

    def sample(logits: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        sampled.append((len(logits), logits.dtype))
        return sampling.sample(logits, *arguments, **named)

    warm_up(sample, 48, VOCAB, torch.bfloat16, CPU)
    assert sampled == [(1, torch.float32), (48, torch.float32)]
