"""The prefill worker's loop: receive messages, compute a batch, announce complete prompts and lease their blocks."""

import time
from collections.abc import Iterable

from common.telemetry.tracing import Tracing
from common.worker.attempts import Attempts
from common.worker.cache_report import CacheReport
from common.worker.lifecycle import Lifecycle
from common.worker.load_report import INTERVAL_SECONDS, LoadReport
from common.worker.worker_parts import WorkerParts
from common.worker.worker_service import WorkerService
from common.worker.worker_telemetry import WorkerTelemetry
from prefill_worker.leases import Leases
from prefill_worker.loop import PrefillLoop, Turn
from prefill_worker.metrics import PrefillMetrics
from prefill_worker.runner import FirstToken, Runner
from prefill_worker.scheduler import Prompt
from twostroke.v1 import inference_pb2
from twostroke.v1 import worker_pb2 as pb

# Most prompts that wait here, of all routers together. A router sends at most two batches ahead, counted in tokens, so
# prompts that are almost wholly cached may come in large numbers.
MAX_WAITING = 4096


class Engine:
    def __init__(
        self,
        parts: WorkerParts,
        service: WorkerService,
        runner: Runner,
        metrics: PrefillMetrics,
        tracing: Tracing,
        max_batch_tokens: int,
        lease_seconds: float,
    ) -> None:
        self._parts = parts
        self._service = service
        self._metrics = metrics
        self._tracing = tracing
        self._telemetry = WorkerTelemetry(metrics, service.address)
        # A sequence is here the prompt, and the token that is sampled.
        self._attempts = Attempts(parts, service, metrics, lambda spec: len(spec.token_ids) + 1)
        self._loop = PrefillLoop(parts, runner, max_batch_tokens)
        self._scheduler = self._loop.scheduler
        self._leases = Leases(parts.blocks, lease_seconds)

    def run(self, lifecycle: Lifecycle) -> None:
        cache = CacheReport(self._service, *self._parts.caches)
        load = LoadReport(self._service, self._metrics, self._load)
        while not lifecycle.over(idle=self._idle):
            self.turn(lifecycle.draining)
            load.send_if_due(ready=not lifecycle.draining)
            cache.send()  # last: a router that connects in between hears of the cache before it can send requests
            self._service.flush()

    def turn(self, draining: bool) -> None:
        """Takes in what has arrived, and computes one batch. `draining`: accepts no new attempts."""
        self._receive(draining)
        self._expire_leases()
        self._parts.turn_host_cache()  # what has been copied counts, though its block may be given away now
        self._tell(self._loop.turn())
        self._parts.turn_host_cache()

    @property
    def _idle(self) -> bool:
        return not (self._scheduler.waiting_count or self._scheduler.running_count or self._leases)

    def _receive(self, draining: bool) -> None:
        for received in self._service.receive(min(self._loop.pause, INTERVAL_SECONDS)):
            if received.message is None:
                self._scheduler.drop_connection(received.connection)
                self._leases.end_connection(received.connection)
                continue
            self._drop_all(received.message.ended)  # first: the router has given their places to new ones
            for prefill in received.message.prefills:
                self._accept(received.connection, prefill, draining)
            self._drop_all(received.message.ended)  # those that the same message asked for

    def _drop_all(self, attempt_ids: Iterable[int]) -> None:
        for attempt_id in attempt_ids:
            self._scheduler.drop(attempt_id)
            self._leases.end(attempt_id)

    def _accept(self, connection: int, prefill: pb.Prefill, draining: bool) -> None:
        refusal = None
        if draining:
            refusal = pb.Ended.CAUSE_DRAINING
        elif self._scheduler.waiting_count >= MAX_WAITING:
            refusal = pb.Ended.CAUSE_FULL
        under_way = self._scheduler.has(prefill.attempt_id) or prefill.attempt_id in self._leases
        spec = self._attempts.accept(connection, prefill, refusal, under_way)
        if spec is not None:
            trace = self._tracing.below(prefill.traceparent)
            grammar = self._parts.grammar_state(spec)
            uncached = prefill.uncached_tokens
            self._scheduler.add(
                Prompt(prefill.attempt_id, connection, spec, grammar=grammar, uncached_tokens=uncached, trace=trace)
            )

    def _expire_leases(self) -> None:
        for prompt in self._leases.expire(time.monotonic()):
            self._attempts.end(prompt, pb.Ended.CAUSE_LEASE_LOST, "nobody took the KV in time")

    def _tell(self, turn: Turn) -> None:
        if turn.launched_tokens:
            self._metrics.batch_tokens.observe(turn.launched_tokens)
        for prompt, first in turn.complete:
            if first.problem is None:
                self._announce(prompt, first)
            else:
                self._parts.blocks.release(prompt.blocks)
                self._attempts.end(prompt, pb.Ended.CAUSE_REJECTED, first.problem)

    def _announce(self, prompt: Prompt, first: FirstToken) -> None:
        self._telemetry.prefilled(prompt.trace, prompt.received_at, prompt.length, prompt.cached_len, prompt.loaded_len)
        self._leases.grant(prompt, time.monotonic())
        self._service.outgoing(prompt.connection).prefilled.add(
            attempt_id=prompt.attempt_id,
            first_token=first.token,
            logprobs=first.logprobs,
            cached_tokens=prompt.cached_len,
            kv=pb.KvLocation(
                pool=self._parts.hello.pool,
                block_ids=prompt.blocks,
                generations=[self._parts.blocks.generation(block) for block in prompt.blocks],
            ),
        )

    def _load(self, ready: bool) -> inference_pb2.WorkerLoad:
        return inference_pb2.WorkerLoad(
            ready=ready,
            waiting=self._scheduler.waiting_count,
            running=self._scheduler.running_count,
            leases=len(self._leases),
            blocks=self._parts.blocks_load(reserved=0),
            host_blocks=self._parts.host_blocks_load,
            totals=self._telemetry.totals,
            pending_tokens=self._scheduler.pending_tokens,
        )
