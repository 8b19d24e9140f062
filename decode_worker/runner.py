"""Launches decode steps: as CUDA graphs on a GPU, eagerly on a CPU."""

import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from common.device.device_io import HostCopy, mark
from common.kv.kv_pool import blocks_for
from common.sampling.guided_sampling import UNRESTRICTED, AllowedTokens, GrammarState
from common.sampling.host_logprobs import HostLogprobs
from common.sampling.special_sampling import AdjustedRows, TokenCounts, wants_adjusting, wants_logprobs
from common.worker.worker_parts import WorkerParts
from decode_worker.batch import DecodeBatch
from decode_worker.drafting import Drafting
from decode_worker.graphs import DecodeGraphs
from decode_worker.scheduler import Sequence
from decode_worker.step import Stepper

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """A launched step: its sequences, row by row, and what it gives for each of them once the device is done."""

    sequences: tuple[Sequence, ...]
    tokens: HostCopy  # [B]; with drafts [B, drafts + 1], after the last -1
    logprobs: HostLogprobs | None
    beginning: torch.cuda.Event | None  # on the device's clock
    late: bool  # the step before it was already over
    problems: Mapping[int, str]  # by row: the sequence's grammar failed, and its token means nothing
    may_draft: bool = False  # its sequences want nothing that a step with drafts cannot give
    drafts: int = 0  # behind each token
    launch_seconds: float = 0.0

    def read(self) -> list[list[int]]:
        """The new tokens of each sequence; waits for them."""
        tokens = self.tokens.get().tolist()
        if not self.drafts:
            return [[token] for token in tokens]
        return [[token for token in row if token >= 0] for row in tokens]

    @property
    def seconds(self) -> float:
        """How long the step took. Only once its tokens have arrived."""
        if self.beginning is None:  # on a CPU it is over when it is launched
            return self.launch_seconds
        return self.tokens.seconds_since(self.beginning)


class Runner:
    """Owns the batch on the device and what a step needs besides. On a GPU `launch` returns at once.

    Args:
        parts: the model and the pool.
        max_batch: most sequences in a step.
        drafts: tokens that a step may draft behind each; 0: none.
    """

    def __init__(self, parts: WorkerParts, max_batch: int, drafts: int = 0) -> None:
        block_size = parts.pool.layout.block_size
        max_blocks, history = blocks_for(parts.max_length, block_size), parts.max_length if drafts else 0
        self.batch = DecodeBatch(max_batch, max_blocks, block_size, parts.device, history=history)
        self.drafts = drafts
        self._drafting = Drafting(drafts, max_batch) if drafts else None
        self._stepper = Stepper(parts.model, parts.pool, parts.ops, parts.model.fused_layers(parts.pool))
        self._counts = TokenCounts(parts.model.config.vocab_size, parts.device)
        self._slots: dict[Sequence, int] = {}  # in the token counts, of sequences whose logits are adjusted
        self._with_logprobs: set[Sequence] = set()
        self._guided = parts.guided
        self._with_grammar: set[Sequence] = set()
        self._adjusted: AdjustedRows | None = None
        self.graphs: DecodeGraphs | None = None
        if parts.device.type == "cuda":
            log.info("one sequence", layers="fused" if self._stepper.fused_layers else "kernel by kernel")
            self.graphs = DecodeGraphs(self._stepper, self.batch.state, max_batch, drafts)
            parts.warm_up_sampling(max_batch)

    def add(self, sequence: Sequence) -> None:
        self.batch.add(sequence)
        if wants_adjusting(sequence.spec, len(sequence.tokens)):
            self._slots[sequence] = self._counts.add(sequence.spec, sequence.tokens)
        if wants_logprobs(sequence.spec):
            self._with_logprobs.add(sequence)
        if sequence.grammar is not None:
            self._with_grammar.add(sequence)
        self._adjusted = None

    def remove(self, sequence: Sequence) -> None:
        self.batch.remove(sequence)
        if (slot := self._slots.pop(sequence, None)) is not None:
            self._counts.remove(slot)
        self._with_logprobs.discard(sequence)
        self._with_grammar.discard(sequence)
        self._adjusted = None

    @torch.inference_mode()
    def launch(self, before: Step | None) -> Step:
        """One step of every sequence in the batch. `before` is the step launched last, if it has not been read yet."""
        began, beginning = time.monotonic(), mark(self.batch.state.tokens.device)
        self.batch.upload()
        sequences = tuple(self.batch.sequences)
        rows = len(sequences)
        if not self._slots and not self._with_logprobs and not self._with_grammar:
            drafts = self.drafts if self._drafting is not None and self._drafting.pays(sequences) else 0
            tokens = self._drafted(rows) if drafts else self._plain(rows)
            return Step(
                sequences,
                HostCopy(tokens),
                None,
                beginning,
                late=_is_over(before),
                problems={},
                may_draft=True,
                drafts=drafts,
                launch_seconds=time.monotonic() - began,
            )
        state = self.batch.state.first(rows)
        logits = self._logits(rows)
        late = _is_over(before)
        adjusted = self._adjusted_rows() if self._slots else None
        sampled = logits if adjusted is None else self._counts.adjust(logits, state.lengths + 1, adjusted)
        allowed = self._allowed(before) if self._with_grammar else UNRESTRICTED
        tokens = self._stepper.sample(state, allowed.restrict(sampled))
        if adjusted is not None:
            self._counts.record(tokens, adjusted)
        self._stepper.advance(state, tokens)
        specs = [sequence.spec for sequence in sequences]
        logprobs = HostLogprobs(specs, logits, tokens) if self._with_logprobs else None
        return Step(sequences, HostCopy(tokens), logprobs, beginning, late, allowed.problems)

    def _allowed(self, before: Step | None) -> AllowedTokens:
        """The tokens that grammars allow next. Waits for the step before if a grammar depends on it; the device
        meanwhile runs the model for the step that is being launched."""
        assert self._guided is not None
        unread: dict[Sequence, list[int]] = {}
        if before is not None and any(sequence.writes_in_flight for sequence in self._with_grammar):
            unread = dict(zip(before.sequences, before.read(), strict=True))
        states: dict[int, GrammarState] = {}
        for row, sequence in enumerate(self.batch.sequences):
            if (state := sequence.grammar) is None:
                continue
            state.accept(sequence.tokens[sequence.spec.prompt_length + len(state.output) :])
            if sequence.writes_in_flight:  # a step: what is in the batch has no pull
                state.accept(unread[sequence])
            states[row] = state
        return self._guided.allowed(states)

    def _plain(self, rows: int) -> Tensor:
        if self.graphs is not None:
            return self.graphs.plain(rows)
        return self._stepper.plain(self.batch.state.first(rows))

    def _drafted(self, rows: int) -> Tensor:
        if self.graphs is not None:
            return self.graphs.drafted(rows)
        return self._stepper.drafted(self.batch.state.first(rows), self.drafts)

    def observe(self, step: Step, tokens: Items[Items[int]]) -> None:
        """A step has been read, and gave these tokens of each sequence."""
        if self._drafting is not None and step.may_draft:
            kept = [len(new) - 1 for new in tokens] if step.drafts else None
            self._drafting.observe(step.sequences, step.seconds, kept)

    def _logits(self, rows: int) -> Tensor:
        if self.graphs is not None:
            return self.graphs.logits(rows)
        return self._stepper.logits(self.batch.state.first(rows))

    def _adjusted_rows(self) -> AdjustedRows:
        if self._adjusted is None:
            self._adjusted = self._counts.select(
                [
                    (row, self._slots[sequence], sequence.spec)
                    for row, sequence in enumerate(self.batch.sequences)
                    if sequence in self._slots
                ]
            )
        return self._adjusted


def _is_over(step: Step | None) -> bool:
    return step is not None and step.tokens.arrived
