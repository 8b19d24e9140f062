"""Grammars that output can be made to follow, compiled by llguidance.

A grammar is text as `LLMatcher.grammar_from_*` writes it. Routers compile it to say what is wrong with it, workers to
follow it, with the same tokenizer and limits, so that a worker can begin whatever a router lets through.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from common.model_config import ModelConfig

T = TypeVar("T")

# The library's defaults except for the lexer's states, which all sequences of a grammar share; each takes about 100
# bytes. The time that a compilation takes is limited in router/grammar_check.py, that of an output in
# guided_sampling.py.
_LIMITS = LLParserLimits(max_lexer_states=100_000, verbose_errors=False)

# Compiled grammars to keep. That of a JSON schema of 256 KiB takes 10 MB, that of a usual one about 10 KB.
KEPT = 32

# The library recurses along rules that name each other, and a thousand of them overflow a thread's usual stack.
STACK_BYTES = 64 << 20


class GrammarError(ValueError):
    """Nothing can follow the grammar; the message says why in a sentence."""


def load_tokenizer(directory: Path, model: ModelConfig) -> LLTokenizer:
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
        return LLTokenizer(file.read_text(encoding="utf-8"), eos_token=list(model.eos_token_ids))
    except (OSError, ValueError) as error:
        raise GrammarError(f"llguidance cannot use {file}: {error}") from error


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the beginning of the output. Releases the GIL. Raises GrammarError."""
    matcher = LLMatcher(tokenizer, grammar, limits=_LIMITS, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()  # checks that there is a first token, and is cached for copies of the matcher
    if matcher.is_error():
        raise GrammarError(problem_of(matcher))
    return matcher


def problem_of(matcher: LLMatcher) -> str:
    """Why the matcher is in error, on one line."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    problem = " ".join(line for line in lines if line and line != "<non-verbose/>")
    return "no text follows it" if problem.startswith("NoExtension") else problem


class OncePerGrammar(Generic[T]):
    """Runs `work` once for each grammar, on a thread, and keeps the most recently used results. For one caller's thread
    only."""

    def __init__(self, work: Callable[[str], T]) -> None:
        self._work = work
        self._kept: OrderedDict[str, Future[T]] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        usual = threading.stack_size(STACK_BYTES)
        try:
            self._thread.submit(int)  # begins the thread
        finally:
            threading.stack_size(usual)

    def __contains__(self, grammar: str) -> bool:
        """Whether the work is done or under way."""
        return grammar in self._kept

    @property
    def waiting(self) -> int:
        """Grammars that are not done yet."""
        return sum(not result.done() for result in self._kept.values())

    def get(self, grammar: str) -> Future[T]:
        """The result of the work, or a GrammarError; starts the work if need be."""
        result = self._kept.get(grammar)
        if result is None:
            result = self._kept[grammar] = self._thread.submit(self._work, grammar)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        return result

    def forget(self, grammar: str, result: Future[T]) -> None:
        """Makes the next `get` start the work again, unless `result` has been replaced already."""
        if self._kept.get(grammar) is result:
            del self._kept[grammar]


class CompiledGrammars(OncePerGrammar[LLMatcher]):
    """Matchers at the beginning of the output, to be copied for each sequence."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        super().__init__(lambda grammar: compile_grammar(tokenizer, grammar))
        self.tokenizer = tokenizer
