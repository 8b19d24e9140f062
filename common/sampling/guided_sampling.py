"""Output that follows a grammar: how far each sequence is in its own, and logits without the tokens it does not allow.

The tokens are sampled on the device, the grammars live on the host: before a sequence's next token can be drawn, the
one before it must have been read.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray
from torch import Tensor

from common.device.device_io import to_device
from common.sampling.grammar import CompiledGrammars, GrammarError, problem_of
from common.sampling.special_sampling import ROWS_AT_ONCE
from common.sequence import SequenceSpec

# Seconds of CPU time that a sequence may spend in its grammar: at the start, and earned back with each token. Most
# grammars take about 10 us a token. An ambiguous one takes longer with every token, and the whole batch waits for it.
WORK, WORK_PER_TOKEN = 0.1, 0.001

# Most seconds that one token is charged for. A virtual machine's pauses count as CPU time, and are no grammar's fault.
MOST_WORK_AT_ONCE = WORK / 4

# Masks that together took longer than this are filled one by one the next time, to see whose grammar takes so long.
LONG_FILL, LONG_FILL_PER_ROW = 0.004, 0.0002

# How often one sequence may have its grammar compiled. The whole batch waits for every time but the first.
MOST_COMPILATIONS = 3


class GrammarState:
    """How far one sequence's output is in its grammar."""

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
        """Whether the grammar is compiled, so that `matcher` need not wait."""
        return self._compiled.done()

    def accept(self, tokens: Sequence[int]) -> None:
        """Moves on by the next tokens of the output."""
        self.output += tokens
        if self._matcher is not None:
            self._consume(self._matcher, tokens)

    def matcher(self) -> LLMatcher:
        """The matcher at the end of the output; it may be in error. Waits until the grammar is compiled.

        Raises:
            GrammarError: the grammar cannot be compiled, or following it takes too much work.
        """
        if self._matcher is None:
            self._matcher = self._compiled.result().deep_copy()
            self._work_left = WORK
            self._consume(self._matcher, self.output)
        if self._work_left < 0:
            raise GrammarError("following it takes too much work")
        return self._matcher

    def compile_again(self) -> LLMatcher:
        """Like `matcher`, with the grammar compiled afresh.

        All matchers of a compiled grammar share its lexer's states, whose number is limited, so one may fail because
        the others used them up. After `MOST_COMPILATIONS` of them a sequence keeps its matcher, in error or not.
        """
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
            self._work_left = min(self._work_left + WORK_PER_TOKEN, WORK)
            with self.working():
                matcher.consume_token(token)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Charges the sequence for what this thread does in the block."""
        began = time.thread_time()
        yield
        self._work_left -= min(time.thread_time() - began, MOST_WORK_AT_ONCE)


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """The tokens that may come next in G rows of a batch. Rows whose grammar failed are not among them."""

    rows: list[int]
    bits: NDArray[np.int32]  # [G, W]: one bit for each token of the tokenizer, lowest bit first
    problems: dict[int, str]  # by row: why its grammar failed

    def restrict(self, logits: Tensor) -> Tensor:
        """A copy of logits [B, V] with -inf for the tokens that are not allowed. Tokens that the model has and the
        tokenizer lacks are never allowed."""
        if not self.rows:
            return logits
        all_rows, all_bits = (
            to_device(array, logits.device) for array in (np.asarray(self.rows), self.bits.view(np.uint8))
        )
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        restricted = logits.clone()
        for rows, packed in zip(torch.split(all_rows, ROWS_AT_ONCE), torch.split(all_bits, ROWS_AT_ONCE), strict=True):
            bits = (packed[:, :, None] >> shifts & 1).flatten(1).bool()
            barred = torch.ones((len(rows), logits.shape[1]), dtype=torch.bool, device=logits.device)
            known = min(bits.shape[1], logits.shape[1])
            barred[:, :known] = ~bits[:, :known]
            restricted[rows] = logits[rows].masked_fill(barred, -torch.inf)
        return restricted


UNRESTRICTED = AllowedTokens([], np.zeros((0, 0), dtype=np.int32), {})


class GuidedSampling:
    """Finds out which tokens the grammars of a batch allow.

    Args:
        grammars: compiled with the worker's own tokenizer.
        vocab_size: tokens that the model has.
        threads: most CPU threads that fill bit masks.
    """

    def __init__(self, grammars: CompiledGrammars, vocab_size: int, threads: int) -> None:
        self._grammars = grammars
        self._words = -(-grammars.tokenizer.tokens.vocab_size // 32)
        # One bit for each token that the model has: a tokenizer may have more.
        self._of_model = np.packbits(np.arange(32 * self._words) < vocab_size, bitorder="little").view(np.int32)
        self._has_others = grammars.tokenizer.tokens.vocab_size > vocab_size
        self._executor = LLExecutor(threads)
        self._fills_take_long = False

    def begin(self, spec: SequenceSpec) -> GrammarState:
        """The state after the output that the spec already has; starts to compile the grammar."""
        state = GrammarState(self._grammars, spec.grammar)
        state.accept(spec.output)
        return state

    def allowed(self, states: Mapping[int, GrammarState]) -> AllowedTokens:
        """The tokens that may come next, for grammar states by row."""
        rows: list[int] = []
        matchers: list[LLMatcher] = []
        problems: dict[int, str] = {}
        for row, state in states.items():
            try:
                matchers.append(state.matcher())
                rows.append(row)
            except GrammarError as error:
                problems[row] = str(error)
        bits = np.zeros((len(rows), self._words), dtype=np.int32)
        if matchers:
            self._fill([states[row] for row in rows], matchers, bits)
        for place, row in enumerate(rows):
            if matchers[place].is_error() and (problem := self._fill_anew(states[row], bits, place)):
                problems[row] = problem
            elif self._has_others and not (bits[place] & self._of_model).any():
                problems[row] = "no token of the model follows"
        if not problems:
            return AllowedTokens(rows, bits, problems)
        good = [place for place, row in enumerate(rows) if row not in problems]
        return AllowedTokens([rows[place] for place in good], bits[good], problems)

    def _fill(self, states: Sequence[GrammarState], matchers: Sequence[LLMatcher], bits: NDArray[np.int32]) -> None:
        places = [(matcher, place) for place, matcher in enumerate(matchers)]
        began = time.perf_counter()
        if len(places) == 1 or self._fills_take_long:
            for state, (matcher, place) in zip(states, places, strict=True):
                with state.working():
                    fill_next_token_bitmask(matcher, bits, place)
        else:
            fill_next_token_bitmask_par(self._executor, places, bits)
        self._fills_take_long = time.perf_counter() - began > LONG_FILL + LONG_FILL_PER_ROW * len(places)

    def _fill_anew(self, state: GrammarState, bits: NDArray[np.int32], place: int) -> str:
        """Tries again with the grammar compiled afresh. Returns what is wrong with it; empty if nothing is."""
        try:
            matcher = state.compile_again()
        except GrammarError as error:
            return str(error)
        if not matcher.is_error():
            fill_next_token_bitmask(matcher, bits, place)
        return problem_of(matcher)


@torch.inference_mode()
def warm_up(most_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Restricts `most_rows` rows of logits once in `dtype`, and once in float32, which penalties turn them into.
    Otherwise the first guided request, and the whole batch with it, would wait while the device loads the kernels."""
    allowed = AllowedTokens([*range(most_rows)], np.zeros((most_rows, -(-vocab_size // 32)), dtype=np.int32), {})
    for kind in (dtype, torch.float32):
        allowed.restrict(torch.zeros((most_rows, vocab_size), dtype=kind, device=device))
