"""Speculative decoding: the same tokens in fewer steps, and only while that is faster."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from unittest import mock

import pytest

from benchmarks.in_process import spec
from benchmarks.parts import LoadedModel, worker_parts
from common.sampling.parameters import SamplingParams
from common.worker.sequence import SequenceSpec
from decode_worker.drafting import RETRY_STEPS, Drafting, most_sequences
from decode_worker.graphs import ladder, passes
from decode_worker.scheduler import Sequence
from tests.one_worker import OneWorker, load_tiny

BLOCK = 4
# The tiny model, greedy, soon says the same again; sampled hot it does not.
GREEDY, HOT = 0.0, 1.0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def always() -> Iterator[None]:
    """A step that may have drafts has some."""
    with mock.patch.object(Drafting, "pays", lambda self, sequences: len(sequences) <= self._most_sequences):
        yield


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
    kept, drafted = metrics.kept_drafts._value.get(), metrics.drafted_tokens._value.get()
    tokens = metrics.output_tokens._value.get()
    assert 0 < kept < drafted
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
    assert one._engine._metrics.kept_drafts._value.get() > 0


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("blocks", [16, 23])
def test_where_blocks_are_scarce(loaded: LoadedModel, blocks: int, ahead: int) -> None:
    """Drafts take what is left: they preempt no sequence that would go on without them, and what was preempted goes on
    as it would have."""
    asked = sequences(4)
    without = worker(loaded, drafts=0, blocks=blocks, ahead=ahead)
    expected = without.run(asked, headroom_tokens=4)
    one = worker(loaded, drafts=4, blocks=blocks, ahead=ahead)
    assert one.run(asked, headroom_tokens=4) == expected
    assert one.preemptions > 0
    assert one._engine._metrics.kept_drafts._value.get() > 0


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
def test_sequences_are_dropped_in_any_turn(loaded: LoadedModel) -> None:
    for turns in range(8):
        one = worker(loaded, drafts=4, ahead=1)
        attempts = [one.ask(asked) for asked in sequences(3)]
        for _ in range(turns):
            one.turn()
        for attempt in attempts[:2]:
            one.cancel(attempt)
        one.finish()
        assert one.ended.get(attempts[2]) is not None


def decide(drafting: Drafting, sequence: Sequence, seconds: dict[bool, float], kept: int, steps: int) -> list[bool]:
    made = []
    for _ in range(steps):
        drafted = drafting.pays([sequence])
        drafting.took(1, drafted, seconds[drafted])
        if drafted:
            drafting.kept(sequence, kept)
        made.append(drafted)
    return made


def a_sequence() -> Sequence:
    return Sequence(1, 0, sequences(1)[0], [1])


def test_drafts_that_are_kept_pay() -> None:
    made = decide(Drafting(4, 8), a_sequence(), {False: 1.0, True: 1.6}, kept=1, steps=10 * RETRY_STEPS)
    assert made.count(False) in range(5, 15), "now and then it is tried without"
    assert all(made[2:RETRY_STEPS])


def test_drafts_that_are_wrong_do_not() -> None:
    made = decide(Drafting(4, 8), a_sequence(), {False: 1.0, True: 1.6}, kept=0, steps=10 * RETRY_STEPS)
    assert made[20:].count(True) in range(5, 15), "now and then it is tried"


def test_a_sequence_that_comes_to_repeat_itself_is_noticed() -> None:
    drafting, sequence, seconds = Drafting(4, 8), a_sequence(), {False: 1.0, True: 1.6}
    assert not any(decide(drafting, sequence, seconds, kept=0, steps=60)[-20:])
    kept = cycle([4])
    made = [drafted for _ in range(20 * RETRY_STEPS) for drafted in decide(drafting, sequence, seconds, next(kept), 1)]
    assert made[-RETRY_STEPS:].count(True) > RETRY_STEPS - 5


def test_a_large_batch_has_none() -> None:
    drafting = Drafting(4, 256)
    assert not drafting.pays([a_sequence()] * (most_sequences(256, 4) + 1))
    assert drafting.pays([a_sequence()] * most_sequences(256, 4))
    assert not drafting.pays([])


def test_memory_for_their_graphs_is_kept_free() -> None:
    assert passes(256, 4).rows == 256 + 255
    assert passes(256, 4).graphs == passes(256).graphs + len(ladder(51))
    assert passes(8, 4).tokens == 8 + 40
