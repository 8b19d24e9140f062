"""The decode worker's loop: receive, take in KV that arrived, one turn of the batch, tell routers what it gave."""

import time
from collections import defaultdict

from common.attempts import Attempts
from common.cache_report import CacheReport
from common.lifecycle import Lifecycle
from common.load_report import INTERVAL_SECONDS, LoadReport
from common.sequence import SequenceSpec
from common.worker_parts import WorkerParts
from common.worker_service import WorkerService
from decode_worker.loop import DecodeLoop, StepTokens, Turn
from decode_worker.metrics import DecodeMetrics
from decode_worker.pulls import Pull, Pulled, Puller
from decode_worker.runner import Runner
from decode_worker.scheduler import Sequence, State
from twostroke.v1 import inference_pb2
from twostroke.v1 import worker_pb2 as pb

# How often the loop looks after KV on its way while no step runs that would bring it round anyway.
PULL_POLL_SECONDS = 0.0002


class Engine:
    def __init__(
        self, parts: WorkerParts, service: WorkerService, runner: Runner, metrics: DecodeMetrics, max_batch: int
    ) -> None:
        self._parts = parts
        self._service = service
        self._metrics = metrics
        self._attempts = Attempts(parts, service, metrics)
        self._loop = DecodeLoop(parts, runner, max_batch)
        self._scheduler = self._loop.scheduler
        self._puller = Puller(parts.pool, parts.device)
        self._totals = inference_pb2.Totals()

    def run(self, lifecycle: Lifecycle) -> None:
        cache = CacheReport(self._service, self._parts.blocks)
        load = LoadReport(self._service, self._metrics, lambda: self._load(ready=not lifecycle.draining))
        while not lifecycle.over(idle=self._idle):
            self._receive(lifecycle.draining)
            self._finish_pulls()
            self._tell(self._loop.turn())
            cache.send()
            load.send_if_due()
            self._service.flush()
        self._puller.close()

    @property
    def _idle(self) -> bool:
        return not self._scheduler.count and not self._loop.busy and not self._puller.busy

    def _receive(self, draining: bool) -> None:
        pause = PULL_POLL_SECONDS if self._puller.busy else INTERVAL_SECONDS
        for received in self._service.receive(0.0 if self._loop.busy else pause):
            if received.message is None:
                for orphan in self._scheduler.of_connection(received.connection):
                    self._loop.drop(orphan)
                continue
            for reserve in received.message.reserves:
                self._reserve(received.connection, reserve, draining)
            self._puller.start(
                Pull(sequence, start.kv, time.monotonic())
                for start in received.message.starts
                if (sequence := self._started(start)) is not None
            )
            for attempt_id in received.message.ended:
                if (sequence := self._scheduler.get(attempt_id)) is not None:
                    self._loop.drop(sequence)

    def _reserve(self, connection: int, reserve: pb.Reserve, draining: bool) -> None:
        spec = self._attempts.accept(connection, reserve, _length, draining)
        if spec is None:
            return
        sequence = Sequence(reserve.attempt_id, connection, spec, list(spec.token_ids))
        admitted = self._scheduler.reserve(sequence, reserve.headroom_tokens)
        self._service.outgoing(connection).reserved.add(
            attempt_id=reserve.attempt_id,
            refused=not admitted,
            cached_tokens=sequence.cached_blocks * self._parts.pool.layout.block_size,
        )

    def _started(self, start: pb.Start) -> Sequence | None:
        sequence = self._scheduler.get(start.attempt_id)
        if sequence is None or sequence.state is not State.RESERVED:
            return None
        sequence.state = State.PULLING
        sequence.tokens.append(start.first_token)
        return sequence

    def _finish_pulls(self) -> None:
        for pulled in self._puller.poll():
            sequence = pulled.sequence
            if sequence.state is State.OVER:
                self._scheduler.release_if_idle(sequence)
            elif pulled.problem:
                cause = pb.Ended.CAUSE_LEASE_LOST if pulled.lease_lost else pb.Ended.CAUSE_FAILED
                self._loop.drop(sequence)
                self._attempts.end(sequence.connection, sequence.attempt_id, cause, pulled.problem)
            else:
                self._measure(pulled)
                self._service.outgoing(sequence.connection).started.add(
                    attempt_id=sequence.attempt_id, transfer_ms=pulled.milliseconds
                )
                if not self._loop.start(sequence):
                    self._attempts.end(sequence.connection, sequence.attempt_id, pb.Ended.CAUSE_FINISHED)

    def _measure(self, pulled: Pulled) -> None:
        layout, sequence = self._parts.pool.layout, pulled.sequence
        cached = sequence.cached_blocks * layout.block_size
        self._metrics.cached_tokens.inc(cached)
        self._metrics.pulled_tokens.inc(sequence.kv_len - cached)
        self._totals.prompt_tokens += sequence.kv_len
        self._totals.cached_tokens += cached
        self._metrics.handover_bytes.inc((len(sequence.blocks) - sequence.cached_blocks) * layout.block_bytes)
        self._metrics.handover_seconds.observe(pulled.milliseconds / 1000)

    def _tell(self, turn: Turn) -> None:
        for step in turn.steps:
            self._tell_tokens(step)
        for sequence in turn.finished:
            self._attempts.end(sequence.connection, sequence.attempt_id, pb.Ended.CAUSE_FINISHED)
        for sequence in turn.preempted:
            self._attempts.end(sequence.connection, sequence.attempt_id, pb.Ended.CAUSE_PREEMPTED)

    def _tell_tokens(self, step: StepTokens) -> None:
        self._metrics.batch_sequences.observe(len(step.sequences))
        self._metrics.output_tokens.inc(len(step.tokens))
        self._totals.output_tokens += len(step.tokens)
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, sequence in enumerate(step.sequences):
            rows_of[sequence.connection].append(row)
        for connection, rows in rows_of.items():
            if self._service.outgoing(connection).HasField("tokens"):
                self._service.flush()  # a message holds one step
            tokens = self._service.outgoing(connection).tokens
            tokens.attempt_ids.extend(step.sequences[row].attempt_id for row in rows)
            tokens.token_ids.extend(step.tokens[row] for row in rows)
            if step.logprobs:
                tokens.logprobs.extend(step.logprobs[row] for row in rows)

    def _load(self, ready: bool) -> inference_pb2.WorkerLoad:
        return inference_pb2.WorkerLoad(
            ready=ready,
            waiting=self._scheduler.waiting_count,
            running=self._scheduler.running_count,
            blocks=self._parts.blocks_load(reserved=self._scheduler.promised),
            totals=self._totals,
        )


def _length(spec: SequenceSpec) -> int:
    """Tokens that a decode worker may have to hold: prompt and output."""
    return spec.max_length
