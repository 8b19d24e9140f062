"""Grammars that output can be made to follow, compiled by llguidance.

A grammar is text as `LLMatcher.grammar_from_*` writes it. Routers compile it to say what is wrong with it, workers to
follow it, with the same tokenizer and limits, so that a worker can begin whatever a router lets through.
"""

import json
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from common.model.model_config import ModelConfig

# The library's defaults except for the lexer's states, which all sequences of a grammar share; each takes about 100
# bytes. The time that a compilation takes is limited in router/grammars/grammar_check.py, that of an output in
# guided_sampling.py.
_LIMITS = LLParserLimits(max_lexer_states=100_000, verbose_errors=False)

# Compiled grammars to keep. That of a JSON schema of 256 KiB takes 10 MB, that of a usual one about 10 KB.
KEPT = 32

# Grammars compiled at once, by a router and by a worker alike, so that what the router lets through does not pile up
# at a worker.
AT_ONCE = 3

# The library recurses along rules that name each other, and a thousand of them overflow a thread's usual stack.
STACK_BYTES = 64 << 20


# Where a grammar leaves one text only, the library tokenizes it and allows the first of these tokens alone. With this
# option it allows all that the text begins with, as it does everywhere else.
_NO_FORCING = '%llguidance {"no_forcing": true}'


class GrammarError(ValueError):
    """Nothing can follow the grammar; the message says why in a sentence."""


@dataclass(frozen=True, slots=True)
class GrammarTokenizer:
    """
    Attributes:
        tokens: the library's.
        special: texts of the tokens that no text in a grammar stands for, such as <|im_end|>.
    """

    tokens: LLTokenizer
    special: tuple[str, ...]


def load_tokenizer(directory: Path, model: ModelConfig) -> GrammarTokenizer:
    """The tokens of `directory`/tokenizer.json, as grammars need them.

    Takes a third of a second for each 50,000 tokens, during which it holds the GIL.

    Raises:
        GrammarError: what is missing, in a sentence.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise GrammarError("the model directory has no tokenizer.json")
    if not model.eos_token_ids:
        raise GrammarError("the model has no end-of-sequence token, with which such an answer would end")
    try:
        text = file.read_text(encoding="utf-8")
        tokens = LLTokenizer(text, eos_token=list(model.eos_token_ids))
    except (OSError, ValueError) as error:
        raise GrammarError(f"llguidance cannot use {file}: {error}") from error
    added = json.loads(text).get("added_tokens", [])
    return GrammarTokenizer(tokens, tuple(it["content"] for it in added if tokens.is_special_token(it["id"])))


def compile_grammar(tokenizer: GrammarTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the beginning of the output. Releases the GIL. Raises GrammarError."""
    if _spells_a_special_token(grammar, tokenizer.special):
        grammar = _without_forcing(grammar)
    matcher = LLMatcher(tokenizer.tokens, grammar, limits=_LIMITS, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()  # checks that there is a first token, and is cached for copies of the matcher
    if matcher.is_error():
        raise GrammarError(problem_of(matcher))
    return matcher


def _spells_a_special_token(grammar: str, special: tuple[str, ...]) -> bool:
    """Whether it has such a text, or at least looks like it.

    Tokenized, the text would become that token, which the library then refuses, as it allows such a token only where
    the grammar names it.
    """
    text = grammar.replace("\\", "")  # regular expressions escape bars and slashes
    return any(it in text for it in special)


def _without_forcing(grammar: str) -> str:
    if not grammar.startswith("{"):  # Lark
        return f"{grammar}\n{_NO_FORCING}"
    try:
        whole = json.loads(grammar)
        first, *others = whole["grammars"]
        grammars = [{"lark_grammar": f"{_NO_FORCING}\nstart: @guide"}, {**first, "name": "guide"}, *others]
        return json.dumps({**whole, "grammars": grammars})
    except RecursionError as error:
        raise GrammarError("it is too deeply nested") from error
    except (ValueError, LookupError, TypeError):
        return grammar  # the library says what is wrong with it


def problem_of(matcher: LLMatcher) -> str:
    """Why the matcher is in error, on one line."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    problem = " ".join(line for line in lines if line and line != "<non-verbose/>")
    return "no text follows it" if problem.startswith("NoExtension") else problem


class CompiledGrammars:
    """Compiles each grammar once, on threads of its own, and keeps the most recently used matchers, at the beginning of
    the output, to be copied for each sequence. For one caller's thread only."""

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        self.tokenizer = tokenizer
        self._kept: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="grammar")
        all_begun = threading.Barrier(AT_ONCE)
        usual = threading.stack_size(STACK_BYTES)
        try:
            for _ in range(AT_ONCE):
                self._threads.submit(all_begun.wait)
        finally:
            threading.stack_size(usual)

    def get(self, grammar: str) -> Future[LLMatcher]:
        """The matcher, or a GrammarError; starts to compile it if need be."""
        result = self._kept.get(grammar)
        if result is None:
            result = self._kept[grammar] = self._threads.submit(self._compile, grammar)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        return result

    def forget(self, grammar: str, result: Future[LLMatcher]) -> None:
        """Makes the next `get` compile it again, unless `result` has been replaced already."""
        if self._kept.get(grammar) is result:
            del self._kept[grammar]

    def _compile(self, grammar: str) -> LLMatcher:
        return compile_grammar(self.tokenizer, grammar)
