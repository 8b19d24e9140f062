"""The decode worker's loop: receive messages and KV; once the next step is due, prefill one batch of own prompts and
make one turn of the running batch; tell routers what came of them."""

import time
from collections import defaultdict
from collections.abc import Iterable

from common.kv.kv_pool import blocks_for
from common.telemetry.tracing import Tracing
from common.worker.attempts import Attempts
from common.worker.cache_report import CacheReport
from common.worker.lifecycle import Lifecycle
from common.worker.load_report import INTERVAL_SECONDS, LoadReport
from common.worker.worker_parts import WorkerParts
from common.worker.worker_service import WorkerService
from decode_worker.claims import Claims
from decode_worker.loop import DecodeLoop, StepTokens, Turn
from decode_worker.metrics import DecodeMetrics
from decode_worker.own_prompts import OwnPrompts
from decode_worker.peer_pools import PeerPools
from decode_worker.pulls import Pull, Puller
from decode_worker.runner import Runner
from decode_worker.scheduler import Sequence, State
from decode_worker.telemetry import DecodeTelemetry
from prefill_worker.loop import GRAMMAR_POLL_SECONDS
from prefill_worker.runner import FirstToken
from twostroke.v1 import inference_pb2
from twostroke.v1 import worker_pb2 as pb

# How often an idle loop checks whether KV has arrived.
PULL_POLL_SECONDS = 0.0002
# How often it checks whether the running step has ended earlier than expected.
STEP_POLL_SECONDS = 0.001


class Engine:
    def __init__(
        self,
        parts: WorkerParts,
        service: WorkerService,
        runner: Runner,
        own_prompts: OwnPrompts,
        metrics: DecodeMetrics,
        tracing: Tracing,
        max_batch: int,
    ) -> None:
        self._parts = parts
        self._service = service
        self._metrics = metrics
        self._tracing = tracing
        self._telemetry = DecodeTelemetry(metrics, service.address, parts.pool.layout)
        self._attempts = Attempts(parts, service, metrics, lambda spec: spec.max_length)
        self._loop = DecodeLoop(parts, runner, max_batch)
        self._scheduler = self._loop.scheduler
        self._own_prompts = own_prompts
        self._peers = PeerPools(parts.pool.layout, parts.device, metrics.peer_speed, service.wake)
        self._puller = Puller(parts.pool, self._peers)
        self._claims = Claims()
        self._uncompiled: list[Sequence] = []  # have their KV, but their grammar is not compiled yet

    def run(self, lifecycle: Lifecycle) -> None:
        cache = CacheReport(self._service, *self._parts.caches)
        load = LoadReport(self._service, self._metrics, self._load, self._claims.kept_from)
        try:
            while not lifecycle.over(idle=self._idle):
                self.turn(lifecycle.draining)
                load.send_if_due(ready=not lifecycle.draining)
                cache.send()  # last: a router that connects in between hears of the cache before it can send requests
                self._service.flush()
        finally:
            self._peers.close()

    def turn(self, draining: bool) -> None:
        """Takes in what has arrived; if a step is due, makes one. `draining`: accepts no new attempts."""
        self._receive(draining)
        self._tell_opened()
        self._finish_pulls()
        self._start_compiled()
        due = self._pause() == 0  # a step, or a chunk before it; until then, sequences that arrive can still join it
        self._prefill()
        if due:
            self._step()
        self._parts.turn_host_cache()  # behind the step, which runs meanwhile

    def _pause(self) -> float:
        """Seconds that the loop can wait for messages, having nothing else to do."""
        pause = min(self._loop.spare_seconds(), STEP_POLL_SECONDS) if self._loop.busy else INTERVAL_SECONDS
        pause = min(pause, self._own_prompts.pause)
        if self._uncompiled:
            pause = min(pause, GRAMMAR_POLL_SECONDS)
        return min(pause, PULL_POLL_SECONDS) if self._puller.busy else pause

    @property
    def _idle(self) -> bool:
        return not (self._scheduler.count or self._loop.busy or self._puller.busy or self._own_prompts.busy)

    def _receive(self, draining: bool) -> None:
        messages = self._service.receive(self._pause())
        self._parts.turn_host_cache()  # what has been copied counts, though its block may be given away now
        for received in messages:
            if received.message is None:
                for orphan in self._scheduler.of_connection(received.connection):
                    self._drop(orphan)
                self._claims.set(received.connection, 0)
                continue
            self._drop_all(received.message.ended)  # first: the router has given their room to new ones
            for handle in received.message.pools:
                self._peers.prove(received.connection, handle)
            for reserve in received.message.reserves:
                self._reserve(received.connection, reserve, draining)
            if received.message.HasField("claimed_blocks"):
                blocks = min(received.message.claimed_blocks, self._parts.pool.layout.num_blocks)
                self._claims.set(received.connection, blocks)
            self._puller.start(
                Pull(sequence, start.kv, time.monotonic())
                for start in received.message.starts
                if (sequence := self._started(start)) is not None
            )
            self._drop_all(received.message.ended)  # those that the same message asked for

    def _reserve(self, connection: int, reserve: pb.Reserve, draining: bool) -> None:
        under_way = self._scheduler.get(reserve.attempt_id) is not None or self._own_prompts.has(reserve.attempt_id)
        refusal = pb.Ended.CAUSE_DRAINING if draining else None
        spec = self._attempts.accept(connection, reserve, refusal, under_way)
        if spec is None:
            return
        state = State.PREFILLING if reserve.prefill else State.RESERVED
        trace = self._tracing.below(reserve.traceparent)
        grammar = self._parts.grammar_state(spec)
        sequence = Sequence(
            reserve.attempt_id, connection, spec, list(spec.token_ids), state, grammar=grammar, trace=trace
        )
        admitted = self._scheduler.reserve(sequence, reserve.headroom_tokens, self._claims.kept_from(connection))
        self._service.outgoing(connection).reserved.add(
            attempt_id=reserve.attempt_id,
            refused=not admitted,
            cached_tokens=self._cached_tokens(sequence),
        )
        if admitted:
            self._claims.set(connection, 0)  # what waited was the router's first
        if admitted and reserve.prefill:
            self._own_prompts.add(sequence)

    def _drop_all(self, attempt_ids: Iterable[int]) -> None:
        for attempt_id in attempt_ids:
            if (sequence := self._scheduler.get(attempt_id)) is not None:
                self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        if sequence.state is State.RUNNING:
            self._telemetry.decoded(sequence, "dropped")
        self._own_prompts.drop(sequence)
        self._loop.drop(sequence)

    def _started(self, start: pb.Start) -> Sequence | None:
        sequence = self._scheduler.get(start.attempt_id)
        if sequence is None or sequence.state is not State.RESERVED:
            return None
        problem = self._problem(sequence, start)
        if problem is not None:  # a fault of a worker or the router, not of the request, which can go on elsewhere
            self._drop(sequence)
            self._attempts.end(sequence, pb.Ended.CAUSE_FAILED, problem)
            return None
        sequence.state = State.PULLING
        sequence.tokens.append(start.first_token)
        return sequence

    def _problem(self, sequence: Sequence, start: pb.Start) -> str | None:
        """What is wrong with this Start; None if it is right."""
        if start.first_token >= self._parts.model.config.vocab_size:
            return f"first_token {start.first_token} is not in the vocabulary"
        blocks = blocks_for(sequence.kv_len, self._parts.pool.layout.block_size)
        named, generations = len(start.kv.block_ids), len(start.kv.generations)
        if named != blocks or generations != blocks:
            return f"{named} blocks with {generations} generations were named for a prompt of {blocks}"
        return None

    def _tell_opened(self) -> None:
        for connection, opened in self._peers.answers():
            self._service.outgoing(connection).opened.append(opened)

    def _finish_pulls(self) -> None:
        for pulled in self._puller.poll():
            sequence = pulled.sequence
            if sequence.state is State.OVER:
                self._scheduler.release_if_idle(sequence)
                continue
            self._telemetry.pulled(pulled)
            if pulled.problem:
                cause = pb.Ended.CAUSE_LEASE_LOST if pulled.lease_lost else pb.Ended.CAUSE_FAILED
                self._loop.drop(sequence)
                self._attempts.end(sequence, cause, pulled.problem)
            else:
                self._service.outgoing(sequence.connection).started.add(
                    attempt_id=sequence.attempt_id, transfer_ms=pulled.milliseconds
                )
                self._start(sequence)

    def _prefill(self) -> None:
        if not self._own_prompts.busy:
            return
        self._service.flush()  # messages need not wait for the chunk, nor its first tokens for the step
        for sequence, first in self._own_prompts.turn():
            if first.problem is None:
                self._announce(sequence, first)
                self._start(sequence)
            else:
                self._drop(sequence)
                self._attempts.end(sequence, pb.Ended.CAUSE_REJECTED, first.problem)
        self._service.flush()

    def _announce(self, sequence: Sequence, first: FirstToken) -> None:
        cached = self._cached_tokens(sequence)
        self._telemetry.prefilled_own(sequence, cached, sequence.loaded_blocks * self._parts.pool.layout.block_size)
        self._service.outgoing(sequence.connection).prefilled.add(
            attempt_id=sequence.attempt_id, first_token=first.token, logprobs=first.logprobs, cached_tokens=cached
        )

    def _cached_tokens(self, sequence: Sequence) -> int:
        """Tokens of the prompt whose KV was here already."""
        return sequence.cached_blocks * self._parts.pool.layout.block_size

    def _start_compiled(self) -> None:
        waiting, self._uncompiled = self._uncompiled, []
        for sequence in waiting:
            if sequence.state is not State.OVER:
                self._start(sequence)

    def _start(self, sequence: Sequence) -> None:
        if sequence.grammar is not None and not sequence.grammar.ready:
            self._uncompiled.append(sequence)  # in the batch, it would make the whole step wait
            return
        sequence.running_since = time.monotonic()
        if not self._loop.start(sequence):
            self._attempts.end(sequence, pb.Ended.CAUSE_FINISHED)

    def _step(self) -> None:
        if self._parts.device.type == "cpu":
            # There a step is computed while it is launched: what came of messages and KV need not wait for that. On a
            # GPU the step comes first, since the thread that sends would contend with it for the interpreter.
            self._service.flush()
        self._tell(self._loop.turn())

    def _tell(self, turn: Turn) -> None:
        for step in turn.steps:
            self._telemetry.stepped(step)
            self._tell_tokens(step)
        for sequence in turn.finished:
            self._telemetry.decoded(sequence, "finished")
            self._attempts.end(sequence, pb.Ended.CAUSE_FINISHED)
        for sequence in turn.preempted:
            self._telemetry.decoded(sequence, "preempted")
            self._attempts.end(sequence, pb.Ended.CAUSE_PREEMPTED)
        for sequence, problem in turn.failed:
            self._telemetry.decoded(sequence, "failed")
            self._attempts.end(sequence, pb.Ended.CAUSE_REJECTED, problem)

    def _tell_tokens(self, step: StepTokens) -> None:
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, sequence in enumerate(step.sequences):
            rows_of[sequence.connection].append(row)
        for connection, rows in rows_of.items():
            if self._service.outgoing(connection).HasField("tokens"):
                self._service.flush()  # the other step may have log-probabilities where this has none
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
            host_blocks=self._parts.host_blocks_load,
            totals=self._telemetry.totals,
        )
