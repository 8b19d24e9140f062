"""The decode worker's loop: receive, take in KV that arrived; when the next step is due, one chunk of own prompts and
one turn of the batch; tell routers what they gave."""

import time
from collections import defaultdict

from common.attempts import Attempts
from common.cache_report import CacheReport
from common.lifecycle import Lifecycle
from common.load_report import INTERVAL_SECONDS, LoadReport
from common.sequence import SequenceSpec
from common.tracing import Tracing
from common.worker_parts import WorkerParts
from common.worker_service import WorkerService
from decode_worker.loop import DecodeLoop, StepTokens, Turn
from decode_worker.metrics import DecodeMetrics
from decode_worker.own_prompts import OwnPrompts
from decode_worker.peer_pools import PeerPools
from decode_worker.pulls import Pull, Pulled, Puller
from decode_worker.runner import Runner
from decode_worker.scheduler import Sequence, State
from prefill_worker.loop import GRAMMAR_POLL_SECONDS
from prefill_worker.runner import FirstToken
from twostroke.v1 import inference_pb2
from twostroke.v1 import worker_pb2 as pb

# How often the loop looks after KV on its way while it has nothing else to do.
PULL_POLL_SECONDS = 0.0002
# How often it looks, while it need not launch the next step yet, whether the one that runs is over all the same.
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
        self._attempts = Attempts(parts, service, metrics)
        self._loop = DecodeLoop(parts, runner, max_batch)
        self._scheduler = self._loop.scheduler
        self._own_prompts = own_prompts
        self._peers = PeerPools(parts.pool.layout, parts.device, metrics.peer_speed, service.wake)
        self._puller = Puller(parts.pool, self._peers)
        self._uncompiled: list[Sequence] = []  # their KV is here, their grammar not compiled yet
        self._totals = inference_pb2.Totals()

    def run(self, lifecycle: Lifecycle) -> None:
        cache = CacheReport(self._service, self._parts.blocks)
        load = LoadReport(self._service, self._metrics, lambda: self._load(ready=not lifecycle.draining))
        while not lifecycle.over(idle=self._idle):
            self.turn(lifecycle.draining)
            load.send_if_due()
            cache.send()  # last: a router that connects in between hears of the cache before it can send requests
            self._service.flush()
        self._peers.close()

    def turn(self, draining: bool) -> None:
        self._receive(draining)
        self._tell_opened()
        self._finish_pulls()
        self._start_compiled()
        if self._pause() > 0:
            return  # who comes before the next step is launched is in it
        self._prefill()
        self._tell(self._loop.turn())

    def _pause(self) -> float:
        """Seconds for which nothing but receiving is to be done."""
        if self._own_prompts.busy:
            return 0.0
        pause = min(self._loop.spare_seconds(), STEP_POLL_SECONDS) if self._loop.busy else INTERVAL_SECONDS
        return min(pause, PULL_POLL_SECONDS) if self._puller.busy or self._uncompiled else pause

    @property
    def _idle(self) -> bool:
        return not (self._scheduler.count or self._loop.busy or self._puller.busy or self._own_prompts.busy)

    def _receive(self, draining: bool) -> None:
        waits = self._own_prompts.held_back and not (self._loop.busy or self._puller.busy)
        for received in self._service.receive(GRAMMAR_POLL_SECONDS if waits else self._pause()):
            if received.message is None:
                for orphan in self._scheduler.of_connection(received.connection):
                    self._drop(orphan)
                continue
            for handle in received.message.pools:
                self._peers.prove(received.connection, handle)
            for reserve in received.message.reserves:
                self._reserve(received.connection, reserve, draining)
            self._puller.start(
                Pull(sequence, start.kv, time.monotonic())
                for start in received.message.starts
                if (sequence := self._started(received.connection, start)) is not None
            )
            for attempt_id in received.message.ended:
                if (sequence := self._scheduler.get(attempt_id)) is not None:
                    self._drop(sequence)

    def _reserve(self, connection: int, reserve: pb.Reserve, draining: bool) -> None:
        under_way = self._scheduler.get(reserve.attempt_id) is not None
        refusal = pb.Ended.CAUSE_DRAINING if draining else None
        spec = self._attempts.accept(connection, reserve, _length, refusal, under_way)
        if spec is None:
            return
        state = State.PREFILLING if reserve.prefill else State.RESERVED
        trace = self._tracing.below(reserve.traceparent)
        follower = self._parts.follower(spec)
        sequence = Sequence(
            reserve.attempt_id, connection, spec, list(spec.token_ids), state, follower=follower, trace=trace
        )
        admitted = self._scheduler.reserve(sequence, reserve.headroom_tokens)
        self._service.outgoing(connection).reserved.add(
            attempt_id=reserve.attempt_id,
            refused=not admitted,
            cached_tokens=sequence.cached_blocks * self._parts.pool.layout.block_size,
        )
        if admitted and reserve.prefill:
            self._own_prompts.add(sequence)

    def _drop(self, sequence: Sequence) -> None:
        if sequence.state is State.RUNNING:
            self._trace_decode(sequence, "dropped")
        self._own_prompts.drop(sequence)
        self._loop.drop(sequence)

    def _end(self, sequence: Sequence, cause: "pb.Ended.Cause.ValueType", detail: str = "") -> None:
        """Tells the router of a sequence that is out already."""
        self._attempts.end(sequence.connection, sequence.attempt_id, cause, detail, sequence.spec.request_id)

    def _started(self, connection: int, start: pb.Start) -> Sequence | None:
        sequence = self._scheduler.get(start.attempt_id)
        if sequence is None or sequence.state is not State.RESERVED:
            return None
        problem = self._problem(sequence, start)
        if problem is not None:  # the workers', or the router's: the request is as good elsewhere
            self._drop(sequence)
            self._end(sequence, pb.Ended.CAUSE_FAILED, problem)
            return None
        sequence.state = State.PULLING
        sequence.tokens.append(start.first_token)
        return sequence

    def _problem(self, sequence: Sequence, start: pb.Start) -> str | None:
        """Why nothing can be done with this Start; None where it can."""
        if start.first_token >= self._parts.model.config.vocab_size:
            return f"first_token {start.first_token} is not in the vocabulary"
        blocks = -(-sequence.kv_len // self._parts.pool.layout.block_size)
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
            elif pulled.problem:
                cause = pb.Ended.CAUSE_LEASE_LOST if pulled.lease_lost else pb.Ended.CAUSE_FAILED
                self._trace_transfer(pulled)
                self._loop.drop(sequence)
                self._end(sequence, cause, pulled.problem)
            else:
                self._measure(pulled)
                self._trace_transfer(pulled)
                self._service.outgoing(sequence.connection).started.add(
                    attempt_id=sequence.attempt_id, transfer_ms=pulled.milliseconds
                )
                self._start(sequence)

    def _prefill(self) -> None:
        if not self._own_prompts.busy:
            return
        self._service.flush()  # what is to be said need not wait for the chunk, nor the first tokens for a step
        for sequence, first in self._own_prompts.turn():
            if first.problem is None:
                self._announce(sequence, first)
                self._start(sequence)
            else:
                self._drop(sequence)
                self._end(sequence, pb.Ended.CAUSE_REJECTED, first.problem)
        self._service.flush()

    def _announce(self, sequence: Sequence, first: FirstToken) -> None:
        cached = self._take_in(sequence)
        sequence.trace.record(
            "prefill",
            sequence.received_at,
            {
                "twostroke.worker": self._service.address,
                "twostroke.input_tokens": sequence.kv_len,
                "twostroke.cached_tokens": cached,
            },
        )
        self._metrics.computed_tokens.inc(sequence.kv_len - cached)
        self._metrics.output_tokens.inc()
        self._totals.prefilled_tokens += sequence.kv_len
        self._totals.output_tokens += 1
        self._service.outgoing(sequence.connection).prefilled.add(
            attempt_id=sequence.attempt_id, first_token=first.token, logprobs=first.logprobs, cached_tokens=cached
        )

    def _start_compiled(self) -> None:
        waiting, self._uncompiled = self._uncompiled, []
        for sequence in waiting:
            if sequence.state is not State.OVER:
                self._start(sequence)

    def _start(self, sequence: Sequence) -> None:
        if sequence.follower is not None and not sequence.follower.ready:
            self._uncompiled.append(sequence)  # a step would wait for it, and all others with it
            return
        sequence.running_since = time.monotonic()
        if not self._loop.start(sequence):
            self._end(sequence, pb.Ended.CAUSE_FINISHED)

    def _take_in(self, sequence: Sequence) -> int:
        """Counts a prompt that is here; returns its tokens that were here already."""
        cached = sequence.cached_blocks * self._parts.pool.layout.block_size
        self._metrics.cached_tokens.inc(cached)
        self._totals.prompt_tokens += sequence.kv_len
        self._totals.cached_tokens += cached
        return cached

    def _measure(self, pulled: Pulled) -> None:
        layout, sequence = self._parts.pool.layout, pulled.sequence
        self._metrics.pulled_tokens.inc(sequence.kv_len - self._take_in(sequence))
        self._metrics.handover_bytes.inc((len(sequence.blocks) - sequence.cached_blocks) * layout.block_bytes)
        self._metrics.handover_seconds.observe(pulled.milliseconds / 1000)

    def _trace_transfer(self, pulled: Pulled) -> None:
        sequence = pulled.sequence
        sequence.trace.record(
            "transfer",
            time.monotonic() - pulled.milliseconds / 1000,
            {
                "twostroke.worker": self._service.address,
                "twostroke.blocks": len(sequence.blocks) - sequence.cached_blocks,
            },
            pulled.problem,
        )

    def _trace_decode(self, sequence: Sequence, outcome: str) -> None:
        """The first token is not among those it counts: it was sampled by who prefilled the prompt."""
        sequence.trace.record(
            "decode",
            sequence.running_since,
            {
                "twostroke.worker": self._service.address,
                "twostroke.outcome": outcome,
                "twostroke.output_tokens": len(sequence.tokens) - len(sequence.spec.token_ids) - 1,
            },
        )

    def _tell(self, turn: Turn) -> None:
        for step in turn.steps:
            self._tell_tokens(step)
        for sequence in turn.finished:
            self._trace_decode(sequence, "finished")
            self._end(sequence, pb.Ended.CAUSE_FINISHED)
        for sequence in turn.preempted:
            self._trace_decode(sequence, "preempted")
            self._end(sequence, pb.Ended.CAUSE_PREEMPTED)
        for sequence, problem in turn.failed:
            self._trace_decode(sequence, "failed")
            self._end(sequence, pb.Ended.CAUSE_REJECTED, problem)

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
