"""The way of queued requests to workers."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import structlog

from router import request_trace
from router.cluster.worker import REFUSAL_PAUSE
from router.cluster.worker_faults import WorkerFault
from router.cluster.workers import DECODE, PREFILL, ROLE_NAMES, Role, Workers
from router.config import RouterConfig
from router.dispatch import choose
from router.dispatch.attempts import Attempts
from router.dispatch.claim import Claim
from router.dispatch.request import Request, State
from router.dispatch.sequence import hash_blocks, sequence_of
from router.dispatch.waiting_queue import WaitingQueue
from router.errors import CallError, fault

log = structlog.get_logger(__name__)

# How many requests that wait for a prefill worker are passed over, at most, in search of one that needs none.
MOST_PASSED = 64

# The share of the router's time that this search may take. It asks every decode worker about each of these requests,
# and could be made with every message of every worker.
SEARCH_SHARE = 0.1

# How long requests are sent out before tokens and new calls get their turn. A long prompt takes milliseconds, and a
# hundred of them may have waited for the same prefix.
SENDING_SECONDS = 0.005


class Placement:
    """Finds workers for the requests in its queue, and begins their attempts."""

    def __init__(self, config: RouterConfig, workers: Workers, attempts: Attempts) -> None:
        self.queue = WaitingQueue()
        self._config = config
        self._workers = workers
        self._attempts = attempts
        self._claim = Claim()
        self._retry: asyncio.TimerHandle | None = None
        self._search_not_before = 0.0  # by the event loop's clock
        self._goes_on = False  # sending out, in the next turn of the event loop

    @property
    def has_work(self) -> bool:
        """Requests wait, or workers may have room that is kept for one."""
        return bool(self.queue) or self._claim.is_open

    def dispatch(self) -> None:
        """Sends out queued requests in order, up to the first for which no worker has room. If that one waits for a
        prefill worker, those behind it that need none may overtake it. If it waits for room on a decode worker, nothing
        may: they would take the room that it waits for."""
        if self._goes_on:
            return
        loop = asyncio.get_running_loop()
        enough = loop.time() + SENDING_SECONDS
        missing = None
        while missing is None:
            request = self.queue.at(0)
            self._claim.first_is(request)
            if request is None:
                return
            missing = self._try_to_place(request)
            if missing is None and loop.time() > enough:
                self.dispatch_soon()
                return
        if missing == PREFILL and any(worker.can_prefill for worker in self._workers.of(DECODE)):
            self._search()

    def dispatch_soon(self) -> None:
        """In the next turn of the event loop."""
        if not self._goes_on:
            self._goes_on = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._goes_on = False
        self.dispatch()

    def _search(self) -> None:
        """Sends out requests that need no prefill worker from behind the first one. If the last search was only just
        made, a timer makes the next one."""
        now = asyncio.get_running_loop().time
        began = now()
        if began < self._search_not_before:
            self._retry_at(self._search_not_before)
            return
        passed = 1
        while passed <= MOST_PASSED and (request := self.queue.at(passed)) is not None:
            missing = self._try_to_place(request)
            if missing == DECODE:
                break
            if missing is not None:
                passed += 1
        ended = now()
        self._search_not_before = ended + min((ended - began) / SEARCH_SHARE, REFUSAL_PAUSE)

    def _try_to_place(self, request: Request) -> Role | None:
        """As `_place`; None as well if the request was given up."""
        missing = None
        with self.at_the_cost_of(request, "cannot be placed"):
            missing = self._place(request)
        return missing

    def _place(self, request: Request) -> Role | None:
        """Sends one request out, or ends it if it can't be served. Returns the role that it has to wait for, None if it
        has left the queue."""
        try:
            self.hash(request)
            if request.recheck_length is not None:  # there were no workers when it came
                request.limit(request.recheck_length(self._workers.max_length()))
        except CallError as error:
            self.take_out(request)
            request.end(error.with_traceback(None))  # whose frames hold the request
            return None
        headroom = request.headroom(self._config.headroom_tokens)
        found = choose.pair(request, self._workers, headroom)
        if isinstance(found, choose.Missing):
            return self._wait_or_end(request, headroom, found)
        attempt, sequence = self._attempts.new(request, found, headroom), sequence_of(request)
        self.take_out(request)
        self._attempts.begin(attempt, sequence, headroom)
        return None

    def hash(self, request: Request) -> None:
        """Hashes its blocks as the connected workers do, if there are any."""
        if (worker := self._workers.any()) is not None:
            hash_blocks(request, worker.kind)

    @contextmanager
    def at_the_cost_of(self, request: Request, event: str) -> Iterator[None]:
        """A bug of the router in what is done here ends this request alone: it loses no worker, and leaves no block
        behind. `event` is what the log calls it.

        Raises:
            WorkerFault: a worker is at fault, not the router.
        """
        try:
            yield
        except WorkerFault:
            raise
        except Exception:
            log.exception(event, request_id=request.id, choice=request.index)
            self._give_up(request)

    def _give_up(self, request: Request) -> None:
        if request.attempt is not None:
            self._attempts.close(request.attempt, "failed", "a fault of the router")
        elif request.state is State.QUEUED:
            self.take_out(request)
        request.end(fault())

    def _wait_or_end(self, request: Request, headroom: int, missing: choose.Missing) -> Role | None:
        """Returns the role that the request waits for. If no connected worker could ever take it, ends it and returns
        None."""
        sentence = None
        if missing.workers and not any(worker.can_hold(missing.tokens) for worker in missing.workers):
            sentence = f"no {ROLE_NAMES[missing.role]} worker that is left can hold {missing.tokens} tokens"
        elif request.prompt.grammar and missing.role == DECODE and not missing.workers and self._workers.paired():
            sentence = "no pair of workers that is left can guide an answer; each worker's log says what it lacks"
        if sentence is not None:
            self.take_out(request)
            request.end(CallError(grpc.StatusCode.UNAVAILABLE, sentence))
            return None
        if missing.role == DECODE:
            self._claim.no_room_for(request, request.length + headroom, missing.workers)
        if self._retry is None:
            self._retry_at(asyncio.get_running_loop().time() + REFUSAL_PAUSE)
        return missing.role

    def take_out(self, request: Request) -> None:
        """It waits no longer."""
        self.queue.remove(request)
        request_trace.queued(request)

    def _retry_at(self, when: float) -> None:
        """Dispatches again no later than `when`, by the event loop's clock."""
        if self._retry is not None:
            if self._retry.when() <= when:
                return
            self._retry.cancel()
        self._retry = asyncio.get_running_loop().call_at(when, self._retry_now)

    def _retry_now(self) -> None:
        self._retry = None
        self.dispatch()
