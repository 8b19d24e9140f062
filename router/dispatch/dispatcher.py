"""Takes requests in, follows each attempt at them through prefill and decode, and resumes those that are cut short."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import grpc
import structlog

from common.worker import causes
from router import request_trace
from router.cluster.worker import Worker
from router.cluster.worker_faults import NO_LOGPROBS, WorkerFault, check_location
from router.cluster.workers import ROLE_NAMES, Role, Workers
from router.config import RouterConfig
from router.dispatch import attempts, blame
from router.dispatch.attempts import Attempts
from router.dispatch.fan_out import fan_out
from router.dispatch.placement import Placement
from router.dispatch.request import Attempt, Request, State
from router.errors import CallError, Exhausted, InvalidArgument
from router.metrics import Metrics
from twostroke.v1 import inference_pb2, worker_pb2

log = structlog.get_logger(__name__)

AttemptMessage = TypeVar(
    "AttemptMessage", worker_pb2.Reserved, worker_pb2.Prefilled, worker_pb2.Started, worker_pb2.Ended
)

# Tokens of prompts that may wait, for each place in the queue. More than that on average would take gigabytes.
TOKENS_OF_A_PLACE = 8192

STOPPED = "the router stopped before the answer was complete; it is safe to try again"


class Dispatcher:
    """Owns every request and attempt. All methods run on the event loop and none of them awaits, so none needs a
    lock."""

    def __init__(self, config: RouterConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self.workers = Workers(config.worker_grace, self._give_up_waiting)
        self._attempts = Attempts()
        self._placement = Placement(config, self.workers, self._attempts)
        self._queue = self._placement.queue
        self._stopped = False

    # ------------------------------------------------------------ load

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def queued_prompt_tokens(self) -> int:
        return self._queue.prompt_tokens

    @property
    def running(self) -> int:
        return len(self._attempts)

    # ------------------------------------------------------------ from clients

    def check_admission(self, requests: int = 1, prompt_tokens: int = 0) -> None:
        """
        Raises:
            CallError: RESOURCE_EXHAUSTED if the queue has no room for so many more now, INVALID_ARGUMENT if it never
                has, UNAVAILABLE if a role has had no worker for longer than the grace period, or after `stop`.
        """
        if self._stopped:
            raise _stopped()
        if requests > self._config.max_queue:
            raise InvalidArgument(
                "n", f"{requests} answers are more than the router's queue of {self._config.max_queue}"
            )
        if (role := self.workers.gone()) is not None:
            raise self._no_worker(role)
        if len(self._queue) + requests > self._config.max_queue:
            raise Exhausted(f"the queue is full ({len(self._queue)} of {self._config.max_queue} requests wait)")
        most_tokens = self._config.max_queue * TOKENS_OF_A_PLACE
        if self._queue and self._queue.prompt_tokens + prompt_tokens > most_tokens:
            waiting = self._queue.prompt_tokens
            raise Exhausted(f"the queue is full (prompts of {waiting} tokens wait, and of at most {most_tokens} may)")

    def submit(self, requests: list[Request]) -> None:
        """Queues the requests, and sends out those that a worker has room for.

        Raises:
            CallError: as `check_admission`; then none of them is queued.
        """
        self.check_admission(len(requests), len(requests[0].prompt.token_ids))
        for request in requests:
            self._placement.hash(request)
        for request in requests:
            self._queue.push(request)
        self._placement.dispatch()

    def drop(self, requests: Iterable[Request]) -> None:
        """Ends requests whose client has gone, or has all that it wants. Those that have ended already are left alone.

        All of them are ended before the room that they leave is given to others: else it would go to those of them
        that are still queued. That waits for the next turn of the event loop, since others may be about to end, too:
        where thousands of calls were cancelled at once, half of them had another attempt begun in vain.
        """
        makes_room = False
        for request in requests:
            if request.state is State.QUEUED:
                makes_room = makes_room or request is self._queue.at(0)  # others may have waited behind it
                self._placement.take_out(request)
            elif request.state is State.DISPATCHED:
                attempt = request.attempt
                assert attempt is not None
                if attempt.decode is not None and attempt.decoding_since is not None:
                    blame.attempt_succeeded(attempt.decode, attempt)  # as far as it got
                self._attempts.close(attempt, "dropped")
                makes_room = True
            else:
                continue
            request.state = State.DROPPED
        if makes_room:
            self._placement.dispatch_soon()

    def stop(self) -> None:
        """Ends all requests, and takes no more."""
        self._stopped = True
        for request in self._queue.clear():
            request_trace.queued(request)
            request.end(_stopped())
        for attempt in self._attempts.under_way():
            request = attempt.request
            with self._placement.at_the_cost_of(request, "cannot be ended"):
                if request.complete:  # the worker has yet to say that it is
                    self._attempts.close(attempt, "finished")
                    request.end()
                else:
                    self._attempts.close(attempt, "router stopped", STOPPED)
                    request.end(_stopped())

    # ------------------------------------------------------------ from workers

    def worker_lost(self, worker: Worker) -> None:
        """Its stream ended, and with it every attempt there."""
        if worker.attempts and worker.load.ready:  # not if it had announced that it would leave
            blame.attempts_failed(worker, worker.attempts)
        self.workers.retire(worker)
        for attempt in list(worker.attempts.values()):
            with self._placement.at_the_cost_of(attempt.request, "cannot be resumed"):
                attempts.leave(worker, attempt)
                self._resume(attempt, worker, "worker lost", (worker,))
        self._placement.dispatch()

    def received(self, worker: Worker, message: worker_pb2.WorkerMessage) -> None:
        """Takes a worker's message in. The order matters: its tokens may be of attempts that it has just started, and
        its load has everything else in the message counted in.

        Raises:
            WorkerFault: the worker broke the protocol; the rest of the message is not taken in.
        """
        if message.HasField("cache"):
            worker.take_cache(message.cache)
        if message.HasField("host_cache"):
            worker.take_host_cache(message.host_cache)
        for opened in message.opened:
            self.workers.opened(worker, opened)
        self._handle_each(self._reserved, worker, message.reserved)
        self._handle_each(self._prefilled, worker, message.prefilled)
        self._handle_each(self._started, worker, message.started)
        if message.HasField("tokens"):
            fan_out(worker.decoding, message.tokens)
        self._handle_each(self._ended, worker, message.ended)
        if message.HasField("load"):
            self._take_load(worker, message.load)
        makes_room = message.reserved or message.prefilled or message.ended or message.opened
        if self._placement.has_work and (makes_room or message.HasField("load")):
            self._placement.dispatch()

    def _take_load(self, worker: Worker, load: inference_pb2.WorkerLoad) -> None:
        worker.take_load(load)
        blame.check_probe(worker)
        if not load.ready:
            self.workers.retire(worker)
        elif not worker.draining and worker not in self.workers.of(worker.role):
            self.workers.add(worker)  # new, or ready again

    def _handle_each(
        self,
        handle: Callable[[Worker, Attempt, AttemptMessage], None],
        worker: Worker,
        messages: Iterable[AttemptMessage],
    ) -> None:
        """Messages about attempts that are over are ignored.

        Raises:
            WorkerFault: the worker broke the protocol.
        """
        for message in messages:
            attempt = worker.attempts.get(message.attempt_id)
            if attempt is None:
                continue
            with self._placement.at_the_cost_of(attempt.request, "cannot go on"):
                handle(worker, attempt, message)

    def _prefilled(self, worker: Worker, attempt: Attempt, prefilled: worker_pb2.Prefilled) -> None:
        if attempt.prefilled is not None:
            return
        if worker is not (attempt.decode if attempt.in_place else attempt.prefill):
            return
        request = attempt.request
        if request.wants_logprobs and not prefilled.HasField("logprobs"):
            raise WorkerFault(NO_LOGPROBS)
        if not attempt.in_place:
            check_location(prefilled.kv, worker.hello.pool, worker.blocks(attempt.length))
        now = time.monotonic()
        attempt.prefilled = prefilled
        worker.prefilled(attempt)
        request.timing.prefill_ms += 1000 * (now - attempt.dispatched_at)
        attempt.trace.record("prefill", attempt.dispatched_at, {"twostroke.cached_tokens": prefilled.cached_tokens})
        if not request.output:
            request.timing.first_token_ms = 1000 * (now - request.arrived_at)
            if not attempt.in_place:
                request.prefill_cached_tokens = prefilled.cached_tokens
            self._metrics.first_token.observe(now - request.arrived_at)
        if request.wants_logprobs:
            request.add_logprobs(prefilled.logprobs)
        request.add(prefilled.first_token)
        if attempt.in_place:
            attempt.decode_cached_tokens = prefilled.cached_tokens
            worker.decoding.requests[attempt.id] = request
            attempts.decoding_began(attempt)
        if request.complete:
            blame.attempt_succeeded(worker, attempt)
            self._attempts.close(attempt, "finished")
            request.end()
        elif attempt.reserved and not attempt.in_place:
            self._start(attempt)

    def _reserved(self, worker: Worker, attempt: Attempt, reserved: worker_pb2.Reserved) -> None:
        if attempt.decode is not worker or attempt.reserved:
            return
        attempt.request.timing.reserved_ms += 1000 * (time.monotonic() - attempt.dispatched_at)
        attempt.trace.record("reserved", attempt.dispatched_at, {"twostroke.cached_tokens": reserved.cached_tokens})
        if reserved.refused:
            attempts.leave_decode(attempt, tell=False)
            worker.note_refusal()
            self._refused(attempt)
            return
        attempt.reserved = True
        worker.reservation_answered(attempt.decode_blocks)
        attempt.decode_cached_tokens = reserved.cached_tokens
        if attempt.prefilled is not None:
            self._start(attempt)

    def _refused(self, attempt: Attempt) -> None:
        """A worker has no room for the attempt. That is not counted as a resume, since it did nothing for it. The other
        worker of the pair may have computed the first token meanwhile; then the next attempt goes on behind that."""
        self._attempts.close(attempt, "refused")
        if attempt.request.complete:  # a worker that prefills refused it after the only token
            attempt.request.end()
        else:
            self._requeue(attempt.request)

    def _start(self, attempt: Attempt) -> None:
        """The prompt's KV is computed and the blocks for it are reserved: the decode worker may pull."""
        assert attempt.prefilled is not None
        assert attempt.decode is not None
        attempt.decode.decoding.requests[attempt.id] = attempt.request
        attempt.decode.send_start(
            worker_pb2.Start(attempt_id=attempt.id, first_token=attempt.prefilled.first_token, kv=attempt.prefilled.kv)
        )

    def _started(self, worker: Worker, attempt: Attempt, started: worker_pb2.Started) -> None:
        if attempt.decode is not worker or attempt.id not in worker.decoding.requests:
            return
        if attempt.decoding_since is not None:
            return
        attempt.request.timing.transfer_ms += started.transfer_ms
        attempt.trace.record("transfer", time.monotonic() - started.transfer_ms / 1000, {})
        attempts.decoding_began(attempt)
        if attempt.prefill is not None:
            blame.attempt_succeeded(attempt.prefill, attempt)  # its KV could be read
        attempts.leave_prefill(attempt, tell=True)

    def _ended(self, worker: Worker, attempt: Attempt, ended: worker_pb2.Ended) -> None:
        request, cause = attempt.request, ended.cause
        if cause == worker_pb2.Ended.CAUSE_DRAINING:
            worker.draining = True
            self.workers.retire(worker)
        suspects = blame.suspects(worker, attempt) if blame.is_fault(attempt, cause) else []
        if request.complete or (cause == worker_pb2.Ended.CAUSE_PREEMPTED and not suspects):
            blame.attempt_succeeded(worker, attempt)
        elif cause not in blame.AMBIGUOUS:
            for suspect in suspects:
                blame.attempts_failed(suspect, (attempt.id,))
        attempts.leave(worker, attempt)
        if cause == worker_pb2.Ended.CAUSE_FULL:
            worker.note_refusal()
            self._refused(attempt)
        elif cause == worker_pb2.Ended.CAUSE_DRAINING and request.length == attempt.length:  # no token came of it
            self._refused(attempt)
        elif cause == worker_pb2.Ended.CAUSE_REJECTED:
            sentence = f"the {ROLE_NAMES[worker.role]} worker cannot serve this request: {ended.detail}"
            self._attempts.close(attempt, "rejected", sentence)
            request.end(CallError(grpc.StatusCode.INVALID_ARGUMENT, sentence))
        else:
            # That includes FINISHED for a request whose last token does not end it: the worker is at fault.
            if cause == worker_pb2.Ended.CAUSE_PREEMPTED:
                request.preemptions += 1
            self._resume(attempt, worker, causes.name_of(cause), suspects, detail=ended.detail)

    # ------------------------------------------------------------ how attempts end

    def _resume(
        self, attempt: Attempt, worker: Worker, cause: str, suspects: Sequence[Worker], detail: str = ""
    ) -> None:
        """Queues the request again, to go on behind the last token that arrived; or finishes it, if that was its last.

        Args:
            worker: the one on which the attempt ended.
            suspects: workers that may be at fault, the one that reported the end first. Empty: it is no fault.
        """
        request = attempt.request
        if request.complete:
            self._attempts.close(attempt, "finished")
            request.end()
            return
        what = f"{cause} ({worker.address}) {detail}".rstrip()
        self._attempts.close(attempt, cause, what if suspects else "")
        request.resumes += 1
        self._metrics.resumes.labels(cause).inc()
        log.info(
            "resuming",
            request_id=request.id,
            choice=request.index,
            cause=cause,
            detail=detail,
            worker=worker.address,
            tokens_so_far=len(request.output),
        )
        if suspects:
            request.faults += 1
            # After the first fault only the worker that reported it is avoided, after the second both of the pair.
            request.avoid.update(suspect.instance for suspect in suspects[: request.faults])
            if request.faults > self._config.max_resumes:
                sentence = f"gave up after {request.faults} faults; the last: {what}"
                request.end(CallError(grpc.StatusCode.UNAVAILABLE, sentence))
                return
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        if (role := self.workers.gone()) is not None:
            request.end(self._no_worker(role))
            return
        request.state = State.QUEUED
        request.queued_at = time.monotonic()
        self._queue.push(request)

    def _give_up_waiting(self) -> None:
        if (role := self.workers.gone()) is not None:
            for request in self._queue.clear():
                request_trace.queued(request)
                request.end(self._no_worker(role))

    def _no_worker(self, role: Role) -> CallError:
        return CallError(grpc.StatusCode.UNAVAILABLE, f"{self.workers.why_missing(role)}; it is safe to try again")


def _stopped() -> CallError:
    return CallError(grpc.StatusCode.UNAVAILABLE, STOPPED)
