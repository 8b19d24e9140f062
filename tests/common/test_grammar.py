"""What can be compiled, what is said of the rest, and what is kept."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from llguidance import LLMatcher
from tokenizers import AddedToken

from common.model.model_config import parse_config
from common.sampling import grammar
from common.sampling.grammar import CompiledGrammars, GrammarError, GrammarTokenizer, compile_grammar, load_tokenizer
from tests.guided import allowed_tokens
from tests.router import models

MODEL = parse_config(models.CONFIG)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write(tmp_path_factory.mktemp("model"), models.byte_level())


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> GrammarTokenizer:
    return load_tokenizer(directory, MODEL)


def test_a_tokenizer_ends_with_the_models_end_tokens(tokenizer: GrammarTokenizer) -> None:
    assert tokenizer.tokens.eos_tokens == [models.EOS]
    assert tokenizer.tokens.vocab_size < models.VOCAB_SIZE


def test_what_a_model_lacks_is_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path, MODEL)
    endless = parse_config({name: value for name, value in models.CONFIG.items() if name != "eos_token_id"})
    with pytest.raises(GrammarError, match="no end-of-sequence token"):
        load_tokenizer(directory, endless)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(GrammarError, match="llguidance cannot use"):
        load_tokenizer(tmp_path, MODEL)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LLMatcher.grammar_from_regex("a("), "unclosed group"),
        (LLMatcher.grammar_from_regex(r"[^\x00-\U0010ffff]"), "no text follows it"),
        (LLMatcher.grammar_from_json_schema({"not": {}}), "Unimplemented keys"),
        (LLMatcher.grammar_from_lark("start: nobody"), "unknown name"),
        ("anything else", "Expected token"),
        ("{<|im_end|>", "key must be a string"),
        ('{"<|im_end|>": 1}', "missing field"),
        (f'{{"<|im_end|>": {"[" * 5_000}', "too deeply nested"),
        ("", "Empty grammar"),
    ],
)
def test_what_cannot_be_followed_is_said_on_one_line(tokenizer: GrammarTokenizer, text: str, words: str) -> None:
    with pytest.raises(GrammarError, match=words) as raised:
        compile_grammar(tokenizer, text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("token", ["</tool_call>", "<|im_end|>", "<｜Ü▁Ü｜>"])
@pytest.mark.parametrize(
    "grammar",
    [
        lambda text: LLMatcher.grammar_from_json_schema({"const": text}),
        lambda text: LLMatcher.grammar_from_regex(re.escape(text)),
        lambda text: LLMatcher.grammar_from_lark(f"start: {json.dumps(text, ensure_ascii=False)}"),
        lambda text: LLMatcher.grammar_from_lark(f'%llguidance {{}}\nstart: "{text}"'),
    ],
)
def test_a_special_token_that_a_grammar_spells_is_written_letter_by_letter(
    tmp_path: Path, token: str, grammar: Callable[[str], str]
) -> None:
    vocabulary = models.byte_level()
    vocabulary.add_special_tokens(["<｜Ü▁Ü｜>"])
    vocabulary.add_tokens([AddedToken("</tool_call>", special=False, normalized=False)])
    tokenizer = load_tokenizer(models.write(tmp_path, vocabulary), MODEL)
    special = [vocabulary.token_to_id(name) for name in ("</tool_call>", "<|im_end|>", "<｜Ü▁Ü｜>")]
    matcher, output = compile_grammar(tokenizer, grammar(token)), list[int]()
    while not matcher.is_accepting():
        allowed = allowed_tokens(tokenizer, matcher)
        assert allowed
        assert not {*allowed} & {*special}
        assert all(matcher.deep_copy().consume_token(token) for token in allowed)
        output.append(allowed[-1])
        matcher.consume_token(allowed[-1])
    assert tokenizer.tokens.decode_str(output).strip('"') == token


def test_each_is_compiled_once_while_it_is_kept(tokenizer: GrammarTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def counted(tokenizer: GrammarTokenizer, text: str) -> LLMatcher:
        compiled.append(text)
        return compile_grammar(tokenizer, text)

    monkeypatch.setattr(grammar, "compile_grammar", counted)
    grammars = CompiledGrammars(tokenizer)
    texts = [LLMatcher.grammar_from_regex(f"a{{{count}}}") for count in range(1, grammar.KEPT + 2)]
    for text in texts[:-1]:
        grammars.get(text)
    for text in texts[:-1]:
        assert not grammars.get(text).result().is_error()
    assert sorted(compiled) == sorted(texts[:-1])
    grammars.get(texts[-1]).result()  # one too many: the one that was asked for first goes
    for text in (texts[1], texts[0]):
        grammars.get(text).result()
    assert sorted(compiled) == sorted([*texts, texts[0]])
    failed = grammars.get(texts[0])
    for _ in range(3):  # sequences that followed the same one
        grammars.forget(texts[0], failed)
        grammars.get(texts[0]).result()
    assert sorted(compiled) == sorted([*texts, texts[0], texts[0]])


def test_a_failure_is_kept_too(tokenizer: GrammarTokenizer) -> None:
    grammars = CompiledGrammars(tokenizer)
    for _ in range(2):
        with pytest.raises(GrammarError):
            grammars.get("start: nobody").result()


def test_one_that_takes_long_does_not_hold_up_the_next(
    tokenizer: GrammarTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(tokenizer: GrammarTokenizer, text: str) -> LLMatcher:
        if text == "slow":
            go_on.wait(10)
        return compile_grammar(tokenizer, LLMatcher.grammar_from_regex("a"))

    monkeypatch.setattr(grammar, "compile_grammar", slow)
    grammars = CompiledGrammars(tokenizer)
    try:
        grammars.get("slow")
        assert not grammars.get("quick").result(timeout=5).is_error()
    finally:
        go_on.set()


def test_each_thread_has_room_for_deep_ones(tokenizer: GrammarTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a thread's usual stack this ends the process."""
    all_there = threading.Barrier(grammar.AT_ONCE)

    def together(tokenizer: GrammarTokenizer, text: str) -> LLMatcher:
        all_there.wait(10)
        return compile_grammar(tokenizer, text)

    monkeypatch.setattr(grammar, "compile_grammar", together)
    grammars = CompiledGrammars(tokenizer)
    rules = "\n".join(f"r{place}: r{place + 1}" for place in range(4_000))
    texts = [LLMatcher.grammar_from_lark(f'start: r0\n{rules}\nr4000: "{number}"') for number in range(grammar.AT_ONCE)]
    for compiled in [grammars.get(text) for text in texts]:
        assert not compiled.result(timeout=30).is_error()
