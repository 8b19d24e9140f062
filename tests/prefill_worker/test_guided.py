"""First tokens that a grammar allows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llguidance import LLMatcher
from tokenizers import Tokenizer

from benchmarks.in_process import spec
from benchmarks.parts import LoadedModel, worker_parts
from common.sampling.parameters import SamplingParams
from common.sequence import SequenceSpec
from prefill_worker.loop import GRAMMAR_POLL_SECONDS
from tests import guided
from tests.one_prefill_worker import OnePrefillWorker
from tests.router import models
from tests.specs import sequence_to_proto
from twostroke.v1 import worker_pb2 as pb

BLOCK = 4
DIGITS = LLMatcher.grammar_from_regex("a[0-9]{4}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write(tmp_path_factory.mktemp("tiny"), models.byte_level())


@pytest.fixture(scope="module")
def loaded(directory: Path) -> LoadedModel:
    torch.set_num_threads(1)
    return guided.load(directory, "float32", torch.device("cpu"), dummy=True, max_length=64)


def asked(prompt: int, output: tuple[int, ...] = (), follows: str = "") -> SequenceSpec:
    tokens = (*range(prompt, prompt + 9), *output)
    made = spec(tokens, 40, temperature=1, block_size=BLOCK)
    return replace(made, prompt_length=9, grammar=follows, sampling=SamplingParams(seed=prompt, logprobs=3))


def answered(one: OnePrefillWorker, *specs: SequenceSpec) -> pb.WorkerMessage:
    """What is said of them; at the end nothing of theirs is held any more."""
    prefills = [pb.Prefill(attempt_id=place, sequence=sequence_to_proto(it)) for place, it in enumerate(specs, start=1)]
    one.send(pb.RouterMessage(prefills=prefills))
    said = pb.WorkerMessage()
    while len(said.prefilled) + len(said.ended) < len(specs):
        said.MergeFrom(one.turn())
    one.send(pb.RouterMessage(ended=[prefilled.attempt_id for prefilled in said.prefilled]))
    one.turn()
    assert one.idle
    assert one.parts.blocks.in_use_count == 0
    return said


@pytest.mark.parametrize("max_batch_tokens", [4, 64])
def test_those_with_a_grammar_follow_it_and_the_others_are_as_ever(
    loaded: LoadedModel, directory: Path, max_batch_tokens: int
) -> None:
    one = OnePrefillWorker(worker_parts(loaded, 60, BLOCK), max_batch_tokens)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    plain = [asked(place) for place in (20, 40, 60)]
    a, zero, nine = (models.token_id(tokenizer, token) for token in "a09")
    expected = {prefilled.attempt_id: prefilled for prefilled in answered(one, *plain).prefilled}
    begun = asked(40, follows=DIGITS)
    resumed = asked(60, output=(a, zero), follows=DIGITS)
    said = {prefilled.attempt_id: prefilled for prefilled in answered(one, plain[0], begun, resumed).prefilled}
    assert said[1].first_token == expected[1].first_token
    assert said[2].first_token == a
    assert zero <= said[3].first_token <= nine
    assert list(said[2].logprobs.top_ids) == list(expected[2].logprobs.top_ids), "of the model's own distribution"
    assert said[2].logprobs.logprob < min(expected[2].logprobs.top_logprobs)


def test_one_whose_grammar_is_not_compiled_yet_holds_up_nobody(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = guided.hold_up_compiler(monkeypatch)
    one = OnePrefillWorker(worker_parts(loaded, 60, BLOCK), max_batch_tokens=64)
    specs = [asked(20, follows=LLMatcher.grammar_from_regex("b")), asked(40), asked(60)]
    prefills = [pb.Prefill(attempt_id=place, sequence=sequence_to_proto(it)) for place, it in enumerate(specs, start=2)]
    one.send(pb.RouterMessage(prefills=prefills))
    said = one.turn()
    assert [prefilled.attempt_id for prefilled in said.prefilled] == [3, 4]
    assert not one.turn().prefilled
    assert not one.turn().prefilled
    assert one._wire.timeouts[-2:] == [0.0, GRAMMAR_POLL_SECONDS], "it comes as soon as it can, and nothing spins"
    go_on.set()
    state = one.parts.grammar_state(specs[0])
    assert state is not None
    state.matcher()  # waits for it
    assert [prefilled.attempt_id for prefilled in one.turn().prefilled] == [2]
    assert not one.turn().prefilled
    assert not one.turn().prefilled
    assert one._wire.timeouts[-1] > GRAMMAR_POLL_SECONDS


def test_a_grammar_that_cannot_be_followed_ends_its_prompt_alone(loaded: LoadedModel) -> None:
    one = OnePrefillWorker(worker_parts(loaded, 60, BLOCK), max_batch_tokens=64)
    wrong = [asked(40, follows="start: nobody"), asked(60, output=(50, 50), follows=DIGITS)]
    said = answered(one, asked(20, follows=DIGITS), *wrong)
    assert [prefilled.attempt_id for prefilled in said.prefilled] == [1]
    assert {ended.attempt_id: ended.cause for ended in said.ended} == dict.fromkeys((2, 3), pb.Ended.CAUSE_REJECTED)
    assert all(ended.detail for ended in said.ended)
