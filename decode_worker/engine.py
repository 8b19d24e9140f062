"""The decode worker's loop: receive, pull, grow, launch a step, deliver the one before."""

import time
from collections import deque
from dataclasses import dataclass

from common.lifecycle import Lifecycle
from common.load_report import INTERVAL_SECONDS, LoadReport
from common.sequence import sequence_from_proto
from common.worker_parts import WorkerParts
from common.worker_service import WorkerService
from decode_worker.metrics import DecodeMetrics
from decode_worker.pulls import Pull, Pulled, Puller
from decode_worker.runner import Runner, StepOutput
from decode_worker.scheduler import Scheduler, Sequence, State
from twostroke.v1 import inference_pb2
from twostroke.v1 import worker_pb2 as pb

# How often the loop looks after KV on its way while no step runs that would bring it round anyway.
PULL_POLL_SECONDS = 0.0002


@dataclass(frozen=True, slots=True)
class Step:
    """A launched step, and the sequences of its rows."""

    sequences: tuple[Sequence, ...]
    output: StepOutput


class Engine:
    def __init__(
        self, parts: WorkerParts, service: WorkerService, runner: Runner, metrics: DecodeMetrics, max_batch: int
    ) -> None:
        self._parts = parts
        self._service = service
        self._runner = runner
        self._metrics = metrics
        self._batch = runner.batch
        self._scheduler = Scheduler(parts.blocks, parts.pool.layout.block_size, max_batch)
        self._puller = Puller(parts.pool, parts.device)
        self._in_flight: deque[Step] = deque()
        # On a GPU a step is launched before the one before it is read, so that the GPU never waits for Python.
        self._steps_ahead = 1 if parts.device.type == "cuda" else 0

    def run(self, lifecycle: Lifecycle) -> None:
        load = LoadReport(self._service, self._metrics, lambda: self._load(ready=not lifecycle.draining))
        while not lifecycle.over(idle=self._idle):
            self._receive(accepting=not lifecycle.draining)
            self._finish_pulls()
            self._grow()
            if self._batch:
                self._in_flight.append(self._launch())
            if len(self._in_flight) > (self._steps_ahead if self._batch else 0):
                self._deliver(self._in_flight.popleft())
            load.send_if_due()
            self._service.flush()
        self._puller.close()

    @property
    def _idle(self) -> bool:
        return not self._scheduler.count and not self._in_flight and not self._puller.busy

    def _receive(self, accepting: bool) -> None:
        if self._batch or self._in_flight:
            patience = 0.0
        else:
            patience = PULL_POLL_SECONDS if self._puller.busy else INTERVAL_SECONDS
        for received in self._service.receive(patience):
            if received.message is None:
                self._forget_router(received.connection)
                continue
            for reserve in received.message.reserves:
                self._reserve(received.connection, reserve, accepting)
            self._puller.start(
                Pull(sequence, start.kv, time.monotonic())
                for start in received.message.starts
                if (sequence := self._started(start)) is not None
            )
            for attempt_id in received.message.ended:
                if (sequence := self._scheduler.get(attempt_id)) is not None:
                    self._drop(sequence)

    def _forget_router(self, connection: int) -> None:
        for sequence in self._scheduler.of_connection(connection):
            self._drop(sequence)
        self._puller.close_gone_peers()

    def _reserve(self, connection: int, reserve: pb.Reserve, accepting: bool) -> None:
        if not accepting:
            self._tell_ended(connection, reserve.attempt_id, pb.Ended.CAUSE_DRAINING)
            return
        try:
            spec = sequence_from_proto(reserve.sequence)
            self._parts.check(spec, length=spec.max_length)
        except ValueError as error:
            self._tell_ended(connection, reserve.attempt_id, pb.Ended.CAUSE_REJECTED, str(error))
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
                self._end(sequence, cause, pulled.problem)
            else:
                self._scheduler.start(sequence)
                self._measure(pulled)
                self._service.outgoing(sequence.connection).started.add(
                    attempt_id=sequence.attempt_id, transfer_ms=pulled.milliseconds
                )
                if sequence.wants_step:
                    self._runner.add(sequence)
                else:
                    self._end(sequence, pb.Ended.CAUSE_FINISHED)

    def _measure(self, pulled: Pulled) -> None:
        layout, sequence = self._parts.pool.layout, pulled.sequence
        cached = sequence.cached_blocks * layout.block_size
        self._metrics.cached_tokens.inc(cached)
        self._metrics.pulled_tokens.inc(sequence.kv_len - cached)
        self._metrics.handover_bytes.inc((len(sequence.blocks) - sequence.cached_blocks) * layout.block_bytes)
        self._metrics.handover_seconds.observe(pulled.milliseconds / 1000)

    def _grow(self) -> None:
        starved = self._scheduler.grow(self._batch.sequences)
        if not starved:
            return
        while self._in_flight:  # their tokens are owed before anyone is preempted, and may end a sequence
            self._deliver(self._in_flight.popleft())
            self._service.flush()
        while starved := self._scheduler.grow([sequence for sequence in starved if sequence in self._batch]):
            self._end(self._scheduler.cheapest(), pb.Ended.CAUSE_PREEMPTED)

    def _launch(self) -> Step:
        step = Step(tuple(self._batch.sequences), self._runner.launch())
        self._metrics.batch_sequences.observe(len(step.sequences))
        for sequence in step.sequences:
            sequence.kv_len += 1
            sequence.steps_in_flight += 1
            if not sequence.wants_step:
                self._runner.remove(sequence)
        return step

    def _deliver(self, step: Step) -> None:
        tokens = step.output.tokens.get().tolist()
        self._metrics.output_tokens.inc(len(tokens))
        logprobs = step.output.logprobs.read() if step.output.logprobs is not None else {}
        for row, (sequence, token) in enumerate(zip(step.sequences, tokens, strict=True)):
            sequence.steps_in_flight -= 1
            if sequence.state is State.OVER:
                self._scheduler.release_if_idle(sequence)
                continue
            self._scheduler.deliver(sequence, token)
            outgoing = self._service.outgoing(sequence.connection).tokens
            outgoing.attempt_ids.append(sequence.attempt_id)
            outgoing.token_ids.append(token)
            if logprobs:
                outgoing.logprobs.append(logprobs.get(row, pb.Logprobs()))
            if token in sequence.spec.stop_token_ids or len(sequence.tokens) >= sequence.spec.max_length:
                self._end(sequence, pb.Ended.CAUSE_FINISHED)

    def _end(self, sequence: Sequence, cause: "pb.Ended.Cause.ValueType", detail: str = "") -> None:
        self._drop(sequence)
        self._tell_ended(sequence.connection, sequence.attempt_id, cause, detail)

    def _tell_ended(
        self, connection: int, attempt_id: int, cause: "pb.Ended.Cause.ValueType", detail: str = ""
    ) -> None:
        """Tells the router that the attempt is over here."""
        self._metrics.ended(cause)
        self._service.outgoing(connection).ended.add(attempt_id=attempt_id, cause=cause, detail=detail)

    def _drop(self, sequence: Sequence) -> None:
        if sequence in self._batch:
            self._runner.remove(sequence)
        self._scheduler.end(sequence)

    def _load(self, ready: bool) -> inference_pb2.WorkerLoad:
        return inference_pb2.WorkerLoad(
            ready=ready,
            waiting=self._scheduler.waiting_count,
            running=self._scheduler.running_count,
            blocks=self._parts.blocks_load(reserved=self._scheduler.promised),
        )
