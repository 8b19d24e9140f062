"""Output that follows a grammar, in a worker that prefills and decodes, whole but for gRPC."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher
from tokenizers import Tokenizer

from benchmarks.in_process import spec
from benchmarks.parts import LoadedModel, worker_parts
from common.sampling.guided_sampling import AllowedTokens, GrammarState, GuidedSampling
from common.sampling.parameters import SamplingParams
from common.sequence import SequenceSpec
from decode_worker.engine import PULL_POLL_SECONDS
from decode_worker.pulls import Puller
from prefill_worker.loop import GRAMMAR_POLL_SECONDS
from tests import guided
from tests.one_worker import OneWorker
from tests.router import models
from twostroke.v1 import worker_pb2 as pb

BLOCK = 4
LENGTH = 60  # tokens of an answer, at most
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5, "pattern": "^[a-z]*$"},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "of": {"type": "array", "items": {"enum": ["ü", "b"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "size", "of"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
REGEX = "[a-f]{3,6}-[0-9]{2}"
CHOICES = ["the quick brown fox", "the lazy dog"]
GRAMMARS = {
    "schema": LLMatcher.grammar_from_json_schema(SCHEMA),
    "regex": LLMatcher.grammar_from_regex(REGEX),
    "choices": LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, CHOICES))}"),
}
KINDS = tuple(GRAMMARS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write(tmp_path_factory.mktemp("tiny"), models.byte_level())


@pytest.fixture(scope="module")
def loaded(directory: Path) -> LoadedModel:
    torch.set_num_threads(1)
    return guided.load(directory, "float32", torch.device("cpu"), dummy=True, max_length=256)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def worker(loaded: LoadedModel, ahead: int = 0, blocks: int = 400, chunk_tokens: int = 512) -> OneWorker:
    """`ahead`: steps that are launched before the one before them is read, as on a GPU."""
    one = OneWorker(worker_parts(loaded, blocks, BLOCK), chunk_tokens=chunk_tokens)
    one._engine._loop._steps_ahead = ahead
    return one


def asked(place: int, kind: str | None, **sampling: Any) -> SequenceSpec:
    tokens = [2 + (7 * place + 31 * at) % 300 for at in range(5 + place)]
    made = spec(tokens, len(tokens) + LENGTH, temperature=0, block_size=BLOCK)
    params = SamplingParams(**{"temperature": 0.0 if place % 2 else 1.0, "seed": place, **sampling})
    return replace(made, sampling=params, stop_token_ids=frozenset([models.EOS]), grammar=GRAMMARS.get(kind or "", ""))


def assert_follows(kind: str, output: list[int], tokenizer: Tokenizer) -> None:
    assert output[-1] == models.EOS
    assert models.EOS not in output[:-1]
    text = tokenizer.decode(output[:-1])
    if kind == "regex":
        assert re.fullmatch(REGEX, text)
    elif kind == "choices":
        assert text in CHOICES
    else:
        answer = json.loads(text)
        assert list(answer) == ["name", "size", "of"]
        assert re.fullmatch("[a-z]{0,5}", answer["name"])
        assert answer["size"] in range(100)
        assert 1 <= len(answer["of"]) <= 2
        assert set(answer["of"]) <= {"ü", "b"}


MIXED = [(place, (*KINDS, None)[place % 4]) for place in range(12)]


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel) -> list[list[int]]:
    one = worker(loaded)
    return [one.run([asked(place, kind)])[0] for place, kind in MIXED]


def test_answers_follow_their_grammars(alone: list[list[int]], tokenizer: Tokenizer) -> None:
    for (_, kind), output in zip(MIXED, alone, strict=True):
        if kind is not None:
            assert_follows(kind, output, tokenizer)
    assert len(set(map(tuple, alone))) == len(alone)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("chunk_tokens", [4, 512])
def test_the_same_beside_others_and_in_chunks(
    loaded: LoadedModel, alone: list[list[int]], ahead: int, chunk_tokens: int
) -> None:
    one = worker(loaded, ahead, chunk_tokens=chunk_tokens)
    assert one.run([asked(place, kind) for place, kind in MIXED]) == alone


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_same_after_preemptions(loaded: LoadedModel, alone: list[list[int]], ahead: int) -> None:
    one = worker(loaded, ahead, blocks=30)
    assert one.run([asked(place, kind) for place, kind in MIXED], headroom_tokens=1) == alone
    assert one.preemptions > 2


@pytest.mark.parametrize("ahead", [0, 1])
def test_penalties_biases_and_filters_go_with_it(loaded: LoadedModel, tokenizer: Tokenizer, ahead: int) -> None:
    with_all: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": ((models.EOS, -50.0), (40, 5.0)),
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.01,
        "logprobs": 2,
    }
    specs = [asked(place, kind, **with_all) for place, kind in enumerate(KINDS)]
    together = worker(loaded, ahead).run([*specs, asked(9, None)])
    for kind, output in zip(KINDS, together, strict=False):
        assert_follows(kind, output, tokenizer)
    assert [worker(loaded).run([one])[0] for one in specs] == together[:-1]


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_length_cuts_it(loaded: LoadedModel, alone: list[list[int]], ahead: int) -> None:
    specs = [asked(place, kind) for place, kind in MIXED]
    cut = [replace(one, max_length=one.prompt_length + 5) for one in specs]
    assert worker(loaded, ahead).run(cut) == [output[:5] for output in alone]


@pytest.mark.parametrize("ahead", [0, 1])
def test_whoever_leaves_in_the_middle_leaves_no_block(loaded: LoadedModel, alone: list[list[int]], ahead: int) -> None:
    one = worker(loaded, ahead)
    attempts = [one.ask(asked(place, kind)) for place, kind in MIXED]
    while len(one.outputs.get(attempts[0], ())) < 4:
        one.turn()
    for attempt in attempts[::2]:
        one.cancel(attempt)
    one.finish()
    assert [one.outputs[attempt] for attempt in attempts[1::2]] == alone[1::2]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("after", [0, 3])
def test_a_grammar_that_fails_ends_its_sequence_alone(
    loaded: LoadedModel, alone: list[list[int]], ahead: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = GuidedSampling.allowed

    def fails_after_a_while(guided: GuidedSampling, states: dict[int, GrammarState]) -> AllowedTokens:
        bad = {row for row, state in states.items() if len(state.output) >= after and "a-f" in state._grammar}
        good = allowed(guided, {row: state for row, state in states.items() if row not in bad})
        return replace(good, problems=dict.fromkeys(bad, "the parser is too complex"))

    monkeypatch.setattr(GuidedSampling, "allowed", fails_after_a_while)
    one = worker(loaded, ahead)
    attempts = [one.ask(asked(place, kind)) for place, kind in MIXED]
    one.finish()
    for attempt, (_, kind), output in zip(attempts, MIXED, alone, strict=True):
        if kind == "regex":
            assert one.ended[attempt] == pb.Ended.CAUSE_REJECTED
            assert one.outputs.get(attempt, []) == output[:after]
        else:
            assert one.ended[attempt] == pb.Ended.CAUSE_FINISHED
            assert one.outputs[attempt] == output


def test_no_worker_goes_on_without_the_grammar(loaded: LoadedModel, alone: list[list[int]]) -> None:
    one = worker(replace(loaded, guided=None))
    refused, served = one.ask(asked(1, "regex")), one.ask(asked(3, None))
    one.finish()
    assert one.ended[refused] == pb.Ended.CAUSE_REJECTED
    assert refused not in one.outputs
    assert one.outputs[served] == alone[3]


def test_a_prompt_whose_grammar_is_not_compiled_yet_spins_no_loop(
    loaded: LoadedModel, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = guided.hold_up_compiler(monkeypatch)
    one = worker(loaded)
    attempt = one.ask(replace(asked(1, None), grammar=LLMatcher.grammar_from_regex("y[a-f]{2}")))
    for _ in range(3):
        one.turn()
    assert one._wire.timeouts[-1] == GRAMMAR_POLL_SECONDS
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Puller, "busy", True)  # of another prompt's KV
        one.turn()
    assert one._wire.timeouts[-1] == PULL_POLL_SECONDS
    plain = one.ask(asked(3, None))
    for _ in range(3):
        one.turn()
    assert one._wire.timeouts[-1] == 0.0
    while plain not in one.ended:
        one.turn()
    assert one.outputs[plain] == alone[3]
    go_on.set()
    one.finish()
    assert one.ended[attempt] == pb.Ended.CAUSE_FINISHED


def test_a_grammar_that_is_not_compiled_yet_holds_up_no_step(
    loaded: LoadedModel, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = guided.hold_up_compiler(monkeypatch)
    one = worker(loaded)
    follows = replace(asked(1, None), grammar=LLMatcher.grammar_from_regex("x[a-f]{2}"))
    arrived, gone = (one.ask(follows, prefills=False) for _ in range(2))
    plain = one.ask(asked(3, None))
    one.turn()
    for attempt in (arrived, gone):  # as if its KV had been pulled
        sequence = one.sequence(attempt)
        sequence.tokens.append(models.VOCAB_SIZE - 1)
        one._engine._start(sequence)
    one.cancel(gone)
    began = time.monotonic()
    while plain not in one.ended:
        one.turn()
    assert time.monotonic() - began < 5
    assert one.outputs[plain] == alone[3]
    assert arrived not in one.ended
    go_on.set()
    one.finish()
    assert one.ended[arrived] == pb.Ended.CAUSE_REJECTED  # that first token is none of its grammar
    assert gone not in one.ended
