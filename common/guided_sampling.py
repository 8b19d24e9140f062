"""Output that follows a grammar: where each sequence is in its own, and logits without the tokens that may not follow.

The tokens are sampled on the device, the grammars live on the host: before a sequence's next token can be drawn, the
one before it must have been read.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray
from torch import Tensor

from common.device_io import to_device
from common.grammar import CompiledGrammars, GrammarError, problem_of
from common.sequence import SequenceSpec

# Seconds of work for the tokens of an output, at first and for each of them. Most grammars take some 10 us for a token;
# one in which a text can be read in many ways takes more with each, and all sequences beside it wait.
WORK, WORK_PER_TOKEN = 0.1, 0.001

# Of its grammar for one sequence: a step, and all sequences in it, waits for all but the first.
MOST_COMPILATIONS = 3


class Follower:
    """One sequence on its way through a grammar."""

    def __init__(self, grammars: CompiledGrammars, grammar: str) -> None:
        self._grammars = grammars
        self._grammar = grammar
        self._compiled = grammars.get(grammar)
        self._matcher: LLMatcher | None = None
        self._work_left = WORK  # seconds
        self._compilations = 1
        self.output: list[int] = []  # so far

    @property
    def ready(self) -> bool:
        """Whether `matcher` would not have to wait."""
        return self._compiled.done()

    def add(self, tokens: Sequence[int]) -> None:
        """The next tokens of the output."""
        self.output += tokens
        if self._matcher is not None:
            self._consume(self._matcher, tokens)

    def matcher(self) -> LLMatcher:
        """At the end of the output, or in error. Waits for the grammar to be compiled; raises GrammarError where it
        cannot be, or where following it takes too much work."""
        if self._matcher is None:
            self._matcher = self._compiled.result().deep_copy()
            self._work_left = WORK
            self._consume(self._matcher, self.output)
        if self._work_left < 0:
            raise GrammarError("following it takes too much work")
        return self._matcher

    def anew(self) -> LLMatcher:
        """As `matcher`, of a grammar that is compiled again: all matchers of one share what its lexer remembers, which
        has a limit. Where that was full, one that fails has done nothing wrong; but one that was begun anew again and
        again stays in error."""
        if self._matcher is not None and self._compilations == MOST_COMPILATIONS:
            return self._matcher
        self._compilations += 1
        self._grammars.forget(self._grammar, self._compiled)
        self._compiled = self._grammars.get(self._grammar)
        self._matcher = None
        return self.matcher()

    def _consume(self, matcher: LLMatcher, tokens: Sequence[int]) -> None:
        for token in tokens:
            if self._work_left < 0:
                return
            began = time.thread_time()
            matcher.consume_token(token)
            work = time.thread_time() - began
            self._work_left = min(self._work_left + WORK_PER_TOKEN, WORK) - work


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may come next in G rows of a batch. Rows whose grammar failed are not among them."""

    rows: list[int]
    bits: NDArray[np.int32]  # [G, W]: a bit for each token that the tokenizer knows, the lowest first
    problems: dict[int, str]  # by row: why its grammar failed

    def restrict(self, logits: Tensor) -> Tensor:
        """logits [B, V] with -inf in place of what may not come next; `logits` stays as it is. Tokens that the model
        has and the tokenizer has not never may."""
        if not self.rows:
            return logits
        rows, packed = (to_device(array, logits.device) for array in (np.asarray(self.rows), self.bits.view(np.uint8)))
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        bits = (packed[:, :, None] >> shifts & 1).flatten(1).bool()
        barred = torch.ones((len(self.rows), logits.shape[1]), dtype=torch.bool, device=logits.device)
        known = min(bits.shape[1], logits.shape[1])
        barred[:, :known] = ~bits[:, :known]
        return logits.index_copy(0, rows, logits[rows].masked_fill(barred, -torch.inf))


class GuidedSampling:
    """What a worker follows grammars with.

    Args:
        grammars: of the worker's own tokenizer.
        vocab_size: of the model.
        threads: that fill masks at most.
    """

    def __init__(self, grammars: CompiledGrammars, vocab_size: int, threads: int) -> None:
        self._grammars = grammars
        self._words = -(-grammars.tokenizer.vocab_size // 32)
        # The bits of tokens that the model has, too: tokenizers may know others.
        self._of_model = np.packbits(np.arange(32 * self._words) < vocab_size, bitorder="little").view(np.int32)
        self._has_others = grammars.tokenizer.vocab_size > vocab_size
        self._executor = LLExecutor(threads)

    def follow(self, spec: SequenceSpec) -> Follower:
        """From the end of the output that the spec has."""
        follower = Follower(self._grammars, spec.grammar)
        follower.add(spec.output)
        return follower

    def allowed(self, followers: Mapping[int, Follower]) -> Allowed:
        """What may come next, for followers by row."""
        rows: list[int] = []
        matchers: list[LLMatcher] = []
        problems: dict[int, str] = {}
        for row, follower in followers.items():
            try:
                matchers.append(follower.matcher())
                rows.append(row)
            except GrammarError as error:
                problems[row] = str(error)
        bits = np.zeros((len(rows), self._words), dtype=np.int32)
        if matchers:
            places = [(matcher, place) for place, matcher in enumerate(matchers)]
            fill_next_token_bitmask_par(self._executor, places, bits)
        for place, row in enumerate(rows):
            if matchers[place].is_error() and (problem := self._fill_anew(followers[row], bits, place)):
                problems[row] = problem
            elif self._has_others and not (bits[place] & self._of_model).any():
                problems[row] = "no token of the model follows"
        if not problems:
            return Allowed(rows, bits, problems)
        good = [place for place, row in enumerate(rows) if row not in problems]
        return Allowed([rows[place] for place in good], bits[good], problems)

    def _fill_anew(self, follower: Follower, bits: NDArray[np.int32], place: int) -> str:
        """What is wrong with it; empty where it was nothing of its own."""
        try:
            matcher = follower.anew()
        except GrammarError as error:
            return str(error)
        if not matcher.is_error():
            fill_next_token_bitmask(matcher, bits, place)
        return problem_of(matcher)


@torch.inference_mode()
def warm_up(vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Restricts logits of `dtype` once, and of float32, as penalties leave them: what the device loads for it would
    otherwise be loaded while the first request that wants it, and all that run beside it, wait."""
    allowed = Allowed([0], np.zeros((1, -(-vocab_size // 32)), dtype=np.int32), {})
    for kind in (dtype, torch.float32):
        allowed.restrict(torch.zeros((1, vocab_size), dtype=kind, device=device))
