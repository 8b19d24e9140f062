"""Launches decode steps: in CUDA graphs on a GPU, one operation after another on a CPU."""

from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from common.device_io import HostCopy, mark
from common.host_logprobs import HostLogprobs
from common.special_sampling import AdjustedRows, TokenCounts, wants_adjusting, wants_logprobs, warm_up
from common.worker_parts import WorkerParts
from decode_worker.batch import DecodeBatch
from decode_worker.graphs import DecodeGraphs
from decode_worker.scheduler import Sequence
from decode_worker.step import Stepper

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a launched step gives for each row of the batch, once the device is through with it."""

    tokens: HostCopy
    logprobs: HostLogprobs | None
    beginning: torch.cuda.Event | None  # on the device's clock

    @property
    def seconds(self) -> float:
        """What the step took, once its tokens are there."""
        return self.tokens.seconds_since(self.beginning)


class Runner:
    """Owns the batch on the device and what a step needs. `launch` returns at once on a GPU."""

    def __init__(self, parts: WorkerParts, max_batch: int) -> None:
        block_size = parts.pool.layout.block_size
        self.batch = DecodeBatch(max_batch, -(-parts.max_length // block_size), parts.device)
        self._stepper = Stepper(parts.model, parts.pool, parts.ops, parts.model.fused_layers(parts.pool))
        self._counts = TokenCounts(parts.model.config.vocab_size, parts.device)
        self._slots: dict[Sequence, int] = {}  # of the sequences in the batch whose logits are adjusted
        self._asks: set[Sequence] = set()  # for log-probabilities
        self._adjusted: AdjustedRows | None = None
        self.graphs: DecodeGraphs | None = None
        if parts.device.type == "cuda":
            log.info("a sequence alone", layers="in one launch" if self._stepper.alone else "kernel by kernel")
            self.graphs = DecodeGraphs(self._stepper, self.batch.state, max_batch)
            warm_up(parts.ops.sample, parts.model.config.vocab_size, parts.pool.tensor.dtype, parts.device)

    def add(self, sequence: Sequence) -> None:
        self.batch.add(sequence)
        if wants_adjusting(sequence.spec, len(sequence.tokens)):
            self._slots[sequence] = self._counts.add(sequence.spec, sequence.tokens)
        if wants_logprobs(sequence.spec):
            self._asks.add(sequence)
        self._adjusted = None

    def remove(self, sequence: Sequence) -> None:
        self.batch.remove(sequence)
        if (slot := self._slots.pop(sequence, None)) is not None:
            self._counts.remove(slot)
        self._asks.discard(sequence)
        self._adjusted = None

    @torch.inference_mode()
    def launch(self) -> StepOutput:
        """One step of every sequence in the batch."""
        beginning = mark(self.batch.state.tokens.device)
        self.batch.upload()
        rows = len(self.batch)
        if not self._slots and not self._asks:
            return StepOutput(HostCopy(self._plain(rows)), None, beginning)
        state = self.batch.state.first(rows)
        logits = self._logits(rows)
        if self._slots:
            adjusted = self._adjusted_rows()
            tokens = self._stepper.sample(state, self._counts.adjust(logits, state.lengths + 1, adjusted))
            self._counts.record(tokens, adjusted)
        else:
            tokens = self._stepper.sample(state, logits)
        self._stepper.advance(state, tokens)
        specs = [sequence.spec for sequence in self.batch.sequences]
        logprobs = HostLogprobs(specs, logits, tokens) if self._asks else None
        return StepOutput(HostCopy(tokens), logprobs, beginning)

    def _plain(self, rows: int) -> Tensor:
        if self.graphs is not None:
            return self.graphs.plain(rows)
        return self._stepper.plain(self.batch.state.first(rows))

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
