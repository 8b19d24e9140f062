"""Which tokens may come next, against the texts that a grammar is for."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray
from tokenizers import Tokenizer

from common.model.model_config import parse_config
from common.sampling import grammar, guided_sampling
from common.sampling.grammar import CompiledGrammars, GrammarTokenizer, load_tokenizer
from common.sampling.guided_sampling import (
    MOST_COMPILATIONS,
    WORK,
    AllowedTokens,
    GrammarState,
    GuidedSampling,
    warm_up,
)
from common.sampling.special_sampling import ROWS_AT_ONCE
from router.vocabulary import token_bytes
from tests.router import models
from tests.specs import spec

MODEL = parse_config(models.CONFIG)
CHOICES = ["the quick", "the quicker", "the fox", "über", "日本 🙂", 'a "b"\n\\']
GRAMMAR = LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, CHOICES))}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write(tmp_path_factory.mktemp("model"), models.byte_level())


@pytest.fixture(scope="module")
def guided(directory: Path) -> GuidedSampling:
    return sampling_of(directory)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def table(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    return token_bytes.read(tokenizer, models.VOCAB_SIZE).table


def sampling_of(directory: Path, vocab_size: int = models.VOCAB_SIZE) -> GuidedSampling:
    return GuidedSampling(CompiledGrammars(load_tokenizer(directory, MODEL)), vocab_size, threads=2)


def begin(guided: GuidedSampling, text: str = GRAMMAR, output: Sequence[int] = ()) -> GrammarState:
    return guided.begin(replace(spec((3, 4, *output), 16), prompt_length=2, grammar=text))


def tokens_of(allowed: AllowedTokens, row: int = 0, vocab_size: int = models.VOCAB_SIZE) -> set[int]:
    logits = torch.zeros(row + 1, vocab_size)
    return set(allowed.restrict(logits)[row].isfinite().nonzero().flatten().tolist())


def test_nothing_but_what_goes_on_with_a_choice_may_come(guided: GuidedSampling, tokenizer: Tokenizer) -> None:
    """All of it may, but for unusual tokens where the text is certain."""
    table = token_bytes.read(tokenizer, models.VOCAB_SIZE).table
    texts = [choice.encode() for choice in CHOICES]
    for choice in CHOICES:
        state, before = begin(guided), b""
        output: list[int] = []
        for token in tokenizer.encode(choice).ids:
            may = tokens_of(guided.allowed({0: state}))
            assert tokens_of(guided.allowed({0: begin(guided, output=output)})) == may, "replayed"
            assert token in may
            assert (models.EOS in may) == (before in texts)
            assert all(any(text.startswith(before + table[it]) for text in texts) for it in may - {models.EOS})
            state.accept([token])
            output.append(token)
            before += table[token]
        assert models.EOS in tokens_of(guided.allowed({0: state}))


def test_only_the_end_may_follow_what_is_complete(guided: GuidedSampling, table: tuple[bytes, ...]) -> None:
    state = begin(guided, LLMatcher.grammar_from_regex("a"))
    state.accept([table.index(b"a")])
    assert tokens_of(guided.allowed({0: state})) == {models.EOS}


def test_rows_without_a_grammar_and_the_logits_stay_as_they_are(
    guided: GuidedSampling, table: tuple[bytes, ...]
) -> None:
    logits = torch.randn(4, models.VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = logits.clone()
    regexes = {3: "[ab]", 1: "c"}
    allowed = guided.allowed({row: begin(guided, LLMatcher.grammar_from_regex(text)) for row, text in regexes.items()})
    restricted = allowed.restrict(logits)
    assert torch.equal(logits, before)
    assert restricted.dtype == logits.dtype
    assert torch.equal(restricted[[0, 2]], logits[[0, 2]])
    for row, text in regexes.items():
        may = [table.index(bytes([byte])) for byte in text.encode() if byte not in b"[]"]
        assert restricted[row].isfinite().nonzero().flatten().tolist() == may
        assert torch.equal(restricted[row, may], logits[row, may])


def test_many_rows_are_restricted_as_each_is_alone() -> None:
    count, vocab_size = 2 * ROWS_AT_ONCE + 3, 100
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count + 1, vocab_size, generator=generator)
    bits = torch.randint(-(2**31), 2**31, (count, 4), generator=generator).int().numpy()
    rows = torch.randperm(count + 1, generator=generator)[:count].tolist()
    together = AllowedTokens(rows, bits, {}).restrict(logits)
    for place, row in enumerate(rows):
        alone = AllowedTokens([0], bits[place : place + 1], {}).restrict(logits[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)
    assert together.isfinite().any(dim=1).all()


@pytest.mark.parametrize("vocab_size", [300, 346, 347, 352, 353, 1000])
def test_what_only_the_model_or_only_the_tokenizer_knows_never_comes(directory: Path, vocab_size: int) -> None:
    anything = begin(sampling_of(directory, vocab_size), LLMatcher.grammar_from_regex(r"(?s:.)*"))
    wide = tokens_of(sampling_of(directory).allowed({0: anything}))
    assert max(wide) < load_tokenizer(directory, MODEL).tokens.vocab_size
    narrow = tokens_of(sampling_of(directory, vocab_size).allowed({0: anything}), vocab_size=vocab_size)
    assert narrow == {token for token in wide if token < vocab_size}


def test_no_token_of_the_model_is_a_problem(directory: Path, table: tuple[bytes, ...]) -> None:
    letter = table.index(b"a")
    guided = sampling_of(directory, vocab_size=letter // 32 * 32)
    states = {
        0: begin(guided, LLMatcher.grammar_from_regex("a")),
        2: begin(guided, LLMatcher.grammar_from_regex("!")),
    }
    allowed = guided.allowed(states)
    assert allowed.problems == {0: "no token of the model follows"}
    assert allowed.rows == [2]
    barely = sampling_of(directory, vocab_size=letter + 1)
    assert tokens_of(barely.allowed({0: states[0]}), vocab_size=letter + 1) == {letter}


def test_a_grammar_that_fails_is_a_problem_of_its_row_alone(guided: GuidedSampling, table: tuple[bytes, ...]) -> None:
    text = LLMatcher.grammar_from_regex("a+")
    states = {
        0: begin(guided, text, output=[table.index(b"b")]),
        1: begin(guided, text, output=[table.index(b"a")]),
        4: begin(guided, "start: nobody"),
    }
    allowed = guided.allowed(states)
    assert list(allowed.problems) == [4, 0]
    assert "unknown name" in allowed.problems[4]
    assert tokens_of(allowed, row=1) == tokens_of(guided.allowed({0: states[1]}))
    assert guided.allowed({0: states[0]}).rows == []
    assert guided.allowed({0: states[1]}).problems == {}


def test_a_lexer_that_is_full_of_others_is_compiled_again(
    directory: Path, table: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[GrammarState] = []
    compile_again = GrammarState.compile_again

    def counted(state: GrammarState) -> LLMatcher:
        begun.append(state)
        return compile_again(state)

    monkeypatch.setattr(grammar, "_LIMITS", LLParserLimits(max_lexer_states=300, verbose_errors=False))
    monkeypatch.setattr(GrammarState, "compile_again", counted)
    guided = sampling_of(directory)
    text = LLMatcher.grammar_from_regex("(a|b)*a(a|b){12}")  # has thousands of states, some for each answer
    a, b = table.index(b"a"), table.index(b"b")
    for number in range(40):
        state = begin(guided, text)
        for place in range(20):
            state.accept([b if number >> place & 1 else a])
            allowed = guided.allowed({0: state})
            assert allowed.problems == {}
            assert {a, b} <= tokens_of(allowed)
    assert 0 < len(begun) == len(set(begun))


def test_a_lexer_that_one_sequence_fills_again_and_again_is_a_problem_of_it(
    directory: Path, table: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    compile_grammar = grammar.compile_grammar

    def counted(tokenizer: GrammarTokenizer, text: str) -> LLMatcher:
        compiled.append(text)
        return compile_grammar(tokenizer, text)

    monkeypatch.setattr(grammar, "_LIMITS", LLParserLimits(max_lexer_states=300, verbose_errors=False))
    monkeypatch.setattr(grammar, "compile_grammar", counted)
    guided = sampling_of(directory)
    state = begin(guided, LLMatcher.grammar_from_regex("(a|b)*a(a|b){12}"))
    letters, choice = [table.index(letter) for letter in (b"a", b"b")], random.Random(0)
    while not guided.allowed({0: state}).problems:
        state.accept([choice.choice(letters)])
    for _ in range(2):
        assert "too many states" in guided.allowed({0: state}).problems[0]
    assert len(compiled) == MOST_COMPILATIONS


def test_a_grammar_that_takes_ever_more_work_is_a_problem_of_its_row(
    guided: GuidedSampling, table: tuple[bytes, ...]
) -> None:
    letter = table.index(b"a")
    ambiguous, simple = 'start: x\nx: x x | "a" | ', 'start: "a"*'
    states = {0: begin(guided, ambiguous), 1: begin(guided, simple)}
    for state in states.values():
        assert guided.allowed({0: state}).problems == {}
        for _ in range(100):
            state.accept([letter] * 10)  # all of it would be half a minute of work
    problems = {0: "following it takes too much work"}
    assert guided.allowed(states).problems == problems
    resumed = {0: begin(guided, ambiguous, [letter] * 1000), 1: begin(guided, simple, [letter] * 1000)}
    began = time.monotonic()
    assert guided.allowed(resumed).problems == problems
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("others", [0, 3])
def test_a_grammar_whose_masks_take_long_is_a_problem_of_its_row(
    guided: GuidedSampling, table: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """The whole batch waits for a mask, as it does for a token to be consumed."""
    letter, slow = table.index(b"a"), 0.02
    states = {row: begin(guided, 'start: "a"*') for row in range(1 + others)}
    assert guided.allowed(states).problems == {}
    matcher = states[0].matcher()

    def take_long(asked: LLMatcher) -> None:
        until = time.thread_time() + slow * (asked is matcher)
        while time.thread_time() < until:
            pass

    def slow_fill(asked: LLMatcher, bits: NDArray[np.int32], place: int) -> None:
        take_long(asked)
        fill_next_token_bitmask(asked, bits, place)

    def slow_fill_all(executor: LLExecutor, places: list[tuple[LLMatcher, int]], bits: NDArray[np.int32]) -> None:
        for asked, _ in places:
            take_long(asked)
        fill_next_token_bitmask_par(executor, places, bits)

    monkeypatch.setattr(guided_sampling, "fill_next_token_bitmask", slow_fill)
    monkeypatch.setattr(guided_sampling, "fill_next_token_bitmask_par", slow_fill_all)
    steps, problems = 0, dict[int, str]()
    while not problems and steps < 50:
        problems = guided.allowed(states).problems
        for state in states.values():
            state.accept([letter])
        steps += 1
    assert problems == {0: "following it takes too much work"}
    assert steps <= WORK / slow + 3
    del states[0]
    for _ in range(20):
        assert guided.allowed(states).problems == {}
        for state in states.values():
            state.accept([letter])


def test_warming_up_restricts_what_both_kinds_of_rows_have() -> None:
    warm_up(3, models.VOCAB_SIZE, torch.bfloat16, torch.device("cpu"))
