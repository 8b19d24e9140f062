"""Speculative decoding: the same tokens in fewer steps, and only while that is faster."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llguidance import LLMatcher

from benchmarks.in_process import spec
from benchmarks.parts import LoadedModel, worker_parts
from common.sampling.parameters import SamplingParams
from common.sequence import SequenceSpec
from decode_worker.drafting import Drafting, most_sequences
from decode_worker.graphs import ladder, passes
from decode_worker.scheduler import Sequence
from tests import guided
from tests.one_worker import OneWorker, always_draft, load_tiny
from tests.router import models

BLOCK = 4
# The tiny model, greedy, soon says the same again; sampled hot it does not.
GREEDY, HOT = 0.0, 1.0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    always_draft(monkeypatch)


def sequences(count: int, max_length: int = 60) -> list[SequenceSpec]:
    """Half of them sampled; of different lengths, some of which end in the middle of the drafts."""
    return [
        spec(
            [*range(30 + index, 36 + index)] * 2,
            max_length - index,
            temperature=HOT if index % 2 else GREEDY,
            seed=index,
            block_size=BLOCK,
        )
        for index in range(count)
    ]


def worker(loaded: LoadedModel, *, drafts: int, blocks: int = 400, ahead: int = 0, max_batch: int = 32) -> OneWorker:
    one = OneWorker(worker_parts(loaded, blocks, BLOCK), drafts=drafts, max_batch=max_batch)
    one._engine._loop._steps_ahead = ahead
    return one


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("drafts", [1, 4, 15])
def test_the_same_tokens_in_fewer_steps(loaded: LoadedModel, drafts: int, ahead: int) -> None:
    asked = sequences(6)
    without = worker(loaded, drafts=0, ahead=ahead)
    expected = without.run(asked)
    one = worker(loaded, drafts=drafts, ahead=ahead)
    assert one.run(asked) == expected
    assert [len(output) for output in expected] == [60 - 12 - index for index in range(6)]
    metrics = one._engine._metrics
    tokens, drafted = metrics.output_tokens._value.get(), metrics.drafted_tokens._value.get()
    assert 0 < one.drafts_kept < drafted
    assert tokens == sum(map(len, expected)) == without._engine._metrics.output_tokens._value.get()
    steps_of = [sum(attempt in step for step in one.tokens_of_step) for attempt in (1, 3, 5)]  # the greedy ones
    assert all(steps < 0.8 * (len(expected[0]) - 1) for steps in steps_of)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("ahead", [0, 1])
def test_what_one_asks_for_does_not_change_with_the_others(loaded: LoadedModel, ahead: int) -> None:
    """Penalties, biases and log-probabilities are nothing for steps with drafts: while such a sequence runs, there are
    none, and the others go on with what was said meanwhile."""
    asked = sequences(4)
    special = SamplingParams(temperature=0, repetition_penalty=1.3, logprobs=2)
    asked[1] = replace(asked[1], sampling=special, max_length=25)
    asked[2] = replace(asked[2], sampling=SamplingParams(temperature=0, logit_bias=((5, 3.0),)), max_length=40)
    expected = worker(loaded, drafts=0).run(asked)
    one = worker(loaded, drafts=4, ahead=ahead)
    assert one.run(asked) == expected
    assert one.drafts_kept > 0


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("blocks", [16, 23])
def test_where_blocks_are_scarce(loaded: LoadedModel, blocks: int, ahead: int) -> None:
    """What was preempted goes on as it would have."""
    asked = sequences(4)
    without = worker(loaded, drafts=0, blocks=blocks, ahead=ahead)
    expected = without.run(asked, headroom_tokens=4)
    one = worker(loaded, drafts=4, blocks=blocks, ahead=ahead)
    assert one.run(asked, headroom_tokens=4) == expected
    assert one.preemptions > 0
    assert one.drafts_kept > 0


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("blocks", range(13, 19))
def test_drafts_preempt_nothing(loaded: LoadedModel, blocks: int, ahead: int) -> None:
    asked = [
        spec(range(40 * index, 40 * index + length), most, temperature=HOT, seed=index, block_size=BLOCK)
        for index, (length, most) in enumerate([(8, 40), (12, 20), (8, 24)], start=1)
    ]
    without, one = (worker(loaded, drafts=drafts, blocks=blocks, ahead=ahead) for drafts in (0, 8))
    assert without.run(asked, headroom_tokens=1) == one.run(asked, headroom_tokens=1)
    assert one.preemptions <= without.preemptions


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("ahead", [0, 1])
def test_nothing_comes_after_a_stop_token_among_drafts(loaded: LoadedModel, ahead: int) -> None:
    (asked,) = sequences(1)
    (whole,) = worker(loaded, drafts=0).run([asked])
    for stop in dict.fromkeys(whole):
        with_stop = replace(asked, stop_token_ids=frozenset({stop}))
        assert worker(loaded, drafts=4, ahead=ahead).run([with_stop]) == [whole[: whole.index(stop) + 1]]


@pytest.mark.usefixtures("always")
def test_what_was_said_is_found_again(loaded: LoadedModel) -> None:
    """Blocks are published once their tokens are certain, whatever drafts were written there before."""
    (asked,) = sequences(1)
    one = worker(loaded, drafts=4, ahead=1)
    (said,) = one.run([asked])
    again = spec([*asked.token_ids, *said[:-1]], 62, temperature=0, block_size=BLOCK)
    (first, *_) = one.run([again])[0]
    assert first == said[-1]
    assert one.cached[2] == (len(again.token_ids) - 1) // BLOCK * BLOCK


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("ahead", [0, 1])
def test_sequences_are_dropped_in_any_turn(loaded: LoadedModel, ahead: int) -> None:
    """Another one takes the place of the first on the device, with drafts in flight."""
    asked = sequences(3)
    expected = worker(loaded, drafts=0).run(asked)
    for turns in range(1, 16):
        one = worker(loaded, drafts=4, ahead=ahead)
        attempts = [one.ask(spec_) for spec_ in asked]
        for _ in range(turns):
            one.turn()
        for attempt in attempts[:2]:
            one.cancel(attempt)
        one.finish()
        assert one.outputs[attempts[2]] == expected[2]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("block_size", [1, 16])
def test_other_block_sizes(loaded: LoadedModel, block_size: int, ahead: int) -> None:
    asked = [
        spec(one.token_ids, one.max_length, temperature=0.0, seed=index, block_size=block_size)
        for index, one in enumerate(sequences(4))
    ]
    parts = (worker_parts(loaded, 1_200 // block_size, block_size) for _ in range(2))
    expected = OneWorker(next(parts)).run(asked)
    one = OneWorker(next(parts), drafts=4)
    one._engine._loop._steps_ahead = ahead
    assert one.run(asked) == expected
    assert one.drafts_kept > 0


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("turns", range(1, 9))
def test_one_with_a_grammar_joins_while_others_have_drafts(tmp_path: Path, turns: int, ahead: int) -> None:
    """And leaves them again; so does one that must not end yet."""
    models.write(tmp_path, models.byte_level())
    torch.set_num_threads(1)
    loaded = guided.load(tmp_path, "float32", torch.device("cpu"), dummy=True, max_length=64)
    plain = sequences(3)
    (late,) = sequences(1)
    late = replace(
        late, grammar=LLMatcher.grammar_from_regex("[a-f]{3,6}-[0-9]{2}"), stop_token_ids=frozenset({models.EOS})
    )
    longer = replace(plain[0], min_length=30, max_length=40, stop_token_ids=frozenset(range(300)))
    answers = []
    for drafts in (0, 4):
        one = worker(loaded, drafts=drafts, ahead=ahead)
        attempts = [one.ask(spec_) for spec_ in plain]
        for _ in range(turns):
            one.turn()
        attempts += [one.ask(late), one.ask(longer)]
        one.finish()
        answers.append([one.outputs[attempt] for attempt in attempts])
    assert answers[0] == answers[1]


def decide(drafting: Drafting, sequence: Sequence, seconds: dict[bool, float], kept: int, steps: int) -> list[bool]:
    made = []
    for _ in range(steps):
        drafted = drafting.pays([sequence])
        drafting.observe([sequence], seconds[drafted], [kept] if drafted else None)
        made.append(drafted)
    return made


def a_sequence() -> Sequence:
    return Sequence(1, 0, sequences(1)[0], [1])


SECONDS = {False: 1.0, True: 1.5}


def test_drafts_that_are_kept_pay() -> None:
    made = decide(Drafting(4, 8), a_sequence(), SECONDS, kept=2, steps=2_000)
    assert made.count(False) in range(30, 50), "a step without gives half as much: one in 50"


def test_drafts_that_are_wrong_do_not() -> None:
    made = decide(Drafting(4, 8), a_sequence(), SECONDS, kept=0, steps=2_000)
    assert made[20:].count(True) in range(50, 65), "one in 33 loses no more than a hundredth"


def test_drafts_that_cost_next_to_nothing_are_tried_often() -> None:
    made = decide(Drafting(4, 8), a_sequence(), {False: 1.0, True: 1.04}, kept=0, steps=2_000)
    assert made[40:].count(True) in range(350, 500)


def test_a_sequence_that_comes_to_repeat_itself_is_noticed() -> None:
    drafting, sequence = Drafting(4, 8), a_sequence()
    assert decide(drafting, sequence, SECONDS, kept=0, steps=60)[-20:].count(True) <= 1
    made = decide(drafting, sequence, SECONDS, kept=4, steps=100)
    assert made.index(True) < 40
    assert made[40:].count(False) < 5


def test_a_large_batch_has_none() -> None:
    drafting = Drafting(4, 256)
    assert not drafting.pays([a_sequence()] * (most_sequences(256, 4) + 1))
    assert drafting.pays([a_sequence()] * most_sequences(256, 4))
    assert not drafting.pays([])


def test_memory_for_their_graphs_is_kept_free() -> None:
    assert passes(256, 4).rows == 256 + 255
    assert passes(256, 4).graphs == passes(256).graphs + len(ladder(51))
    assert passes(8, 4).tokens == 8 + 40
    assert (passes(256).histories, passes(256, 4).histories) == (0, 256)
