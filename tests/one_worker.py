"""A decode worker that prefills, whole but for gRPC: the test makes the engine's turns, and is its router."""

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks.parts import LoadedModel, load_model
from common.kv.prefix_hash import block_hashes
from common.sequence import SequenceSpec
from common.telemetry.tracing import Tracing
from common.worker.worker_parts import WorkerParts
from common.worker.worker_service import Received, WorkerService
from decode_worker.drafting import Drafting
from decode_worker.engine import Engine
from decode_worker.metrics import DecodeMetrics
from decode_worker.own_prompts import OwnPrompts
from decode_worker.runner import Runner
from decode_worker.scheduler import Scheduler, Sequence
from prefill_worker.runner import Runner as PromptRunner
from tests.router import models
from tests.specs import sequence_to_proto
from twostroke.v1 import worker_pb2 as pb

ROUTER = 0


def always_draft(patch: pytest.MonkeyPatch) -> None:
    """Every step that may have drafts has some."""
    patch.setattr(Drafting, "pays", lambda self, sequences: len(sequences) <= self._most_sequences)


def load_tiny(directory: Path) -> LoadedModel:
    """A tiny model with random weights in float32, of sequences of up to 64 tokens, written to the directory."""
    torch.set_num_threads(1)
    models.write(directory, models.byte_level())
    return load_model(directory, "float32", torch.device("cpu"), dummy=True, max_length=64)


class Wire:
    """What the engine knows of a `WorkerService`."""

    address = "here"

    def __init__(self) -> None:
        self.to_worker: list[Received] = []
        self.to_router: list[pb.WorkerMessage] = []
        self.timeouts: list[float] = []  # that were waited for messages
        self._next = pb.WorkerMessage()

    def receive(self, timeout: float) -> list[Received]:
        self.timeouts.append(timeout)
        received, self.to_worker = self.to_worker, []
        return received

    def outgoing(self, connection: int) -> pb.WorkerMessage:
        assert connection == ROUTER
        return self._next

    def wake(self) -> None:
        """`receive` does not wait."""

    def flush(self) -> None:
        self.to_router.append(self._next)
        self._next = pb.WorkerMessage()


class OneWorker:
    """
    Args:
        parts: the model and the pool.
        chunk_tokens: of prompts, computed between two steps.
        graphs: False turns CUDA graphs off.
        drafts: behind each token.
    """

    def __init__(
        self,
        parts: WorkerParts,
        *,
        chunk_tokens: int = 512,
        max_batch: int = 32,
        graphs: bool = True,
        drafts: int = 0,
    ) -> None:
        self.parts = parts
        self.outputs: dict[int, list[int]] = {}  # by attempt
        self.cached: dict[int, int] = {}  # tokens, by attempt
        self.refused: set[int] = set()
        self.ended: dict[int, pb.Ended.Cause.ValueType] = {}
        self.tokens_of_step: list[list[int]] = []  # the attempts of each step
        runner = Runner(parts, max_batch, drafts)
        prompt_runner = PromptRunner(parts)
        if graphs:
            prompt_runner.capture(chunk_tokens)
        else:
            runner.graphs = None
        self._wire = Wire()
        self._own = OwnPrompts(parts, prompt_runner, chunk_tokens)
        self._engine = Engine(
            parts, cast(WorkerService, cast(Any, self._wire)), runner, self._own, DecodeMetrics(), Tracing(), max_batch
        )
        self._attempts = 0

    @property
    def scheduler(self) -> Scheduler:
        return self._engine._scheduler

    def sequence(self, attempt: int) -> Sequence:
        sequence = self.scheduler.get(attempt)
        assert sequence is not None
        return sequence

    def ask(self, spec: SequenceSpec, headroom_tokens: int = 1_000, *, prefills: bool = True) -> int:
        """Sends a reservation with the prompt, which the worker `prefills`, or others do; it sees it in its next turn.
        Returns the attempt."""
        self._attempts += 1
        reserve = pb.Reserve(
            attempt_id=self._attempts,
            sequence=sequence_to_proto(spec),
            headroom_tokens=headroom_tokens,
            prefill=prefills,
        )
        self._wire.to_worker.append(Received(ROUTER, pb.RouterMessage(reserves=[reserve])))
        return self._attempts

    def cancel(self, attempt: int) -> None:
        self._wire.to_worker.append(Received(ROUTER, pb.RouterMessage(ended=[attempt])))

    def router_gone(self) -> None:
        self._wire.to_worker.append(Received(ROUTER, None))

    def turn(self) -> None:
        self._engine.turn(draining=False)
        self._wire.flush()
        messages, self._wire.to_router = self._wire.to_router, []
        for message in messages:
            self._read(message)

    def finish(self) -> None:
        """Turns until nothing is left to do; then no block may be in use."""
        while self._wire.to_worker or not self._engine._idle:
            self.turn()
        assert (self.parts.blocks.in_use_count, self.scheduler.promised) == (0, 0)

    def run(self, specs: Items[SequenceSpec], headroom_tokens: int = 1_000) -> list[list[int]]:
        """Runs all to their ends, refused and preempted ones again and again. Returns the output of each."""
        waiting = deque((index, spec, headroom_tokens) for index, spec in enumerate(specs))
        under_way: dict[int, tuple[int, SequenceSpec]] = {}
        outputs: list[list[int]] = [[] for _ in specs]
        while waiting or under_way:
            if waiting:
                index, spec, headroom = waiting.popleft()
                attempt = self.ask(spec, headroom)
                under_way[attempt] = (index, spec)
            self.turn()
            for attempt in [attempt for attempt in under_way if attempt in self.ended or attempt in self.refused]:
                index, spec = under_way.pop(attempt)
                outputs[index] += self.outputs.get(attempt, [])
                if self.ended.get(attempt) == pb.Ended.CAUSE_FINISHED:
                    continue
                came_back = attempt in self.ended or len(spec.token_ids) > spec.prompt_length
                waiting.appendleft((index, self._resumed(spec, attempt), 1_000 if came_back else headroom_tokens))
        self.finish()
        return outputs

    @property
    def drafts_kept(self) -> int:
        return int(self._engine._metrics.kept_drafts._value.get())

    @property
    def preemptions(self) -> int:
        return sum(cause == pb.Ended.CAUSE_PREEMPTED for cause in self.ended.values())

    def _resumed(self, spec: SequenceSpec, attempt: int) -> SequenceSpec:
        tokens = (*spec.token_ids, *self.outputs.get(attempt, []))
        hashes = block_hashes(spec.cache_root, tokens, self.parts.pool.layout.block_size)
        return replace(spec, token_ids=tokens, block_hashes=tuple(hashes))

    def _read(self, message: pb.WorkerMessage) -> None:
        self.refused.update(reserved.attempt_id for reserved in message.reserved if reserved.refused)
        for prefilled in message.prefilled:
            assert not prefilled.HasField("kv")
            self.outputs[prefilled.attempt_id] = [prefilled.first_token]
            self.cached[prefilled.attempt_id] = prefilled.cached_tokens
        if message.HasField("tokens"):
            self.tokens_of_step.append(list(message.tokens.attempt_ids))
            for attempt, token in zip(message.tokens.attempt_ids, message.tokens.token_ids, strict=True):
                self.outputs[attempt].append(token)
        self.ended.update((ended.attempt_id, ended.cause) for ended in message.ended)
