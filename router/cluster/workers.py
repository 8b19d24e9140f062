"""The workers that take requests, by role; which of them are pairs; and how long a role has been without one."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import structlog

from router.cluster.worker import Worker
from twostroke.v1 import inference_pb2, worker_pb2

log = structlog.get_logger(__name__)

Role: TypeAlias = inference_pb2.WorkerRole.ValueType

PREFILL = inference_pb2.WORKER_ROLE_PREFILL
DECODE = inference_pb2.WORKER_ROLE_DECODE
ROLE_NAMES: dict[Role, str] = {PREFILL: "prefill", DECODE: "decode"}

# Seconds before a decode worker that could not read a prefill worker's pool is asked again.
ASK_AGAIN_SECONDS = 5.0


class Workers:
    """
    Args:
        grace: seconds without a worker after which a role counts as gone.
        role_gone: called when a role has become so.
    """

    def __init__(self, grace: float, role_gone: Callable[[], None]) -> None:
        self._grace = grace
        self._role_gone = role_gone
        # Decode comes first: if the only worker, which prefilled too, is gone, then a decode worker is said to be
        # missing.
        self._of_role: dict[Role, list[Worker]] = {DECODE: [], PREFILL: []}
        self._missing_since = dict.fromkeys(self._of_role, time.monotonic())
        self._asked_again: set[tuple[Worker, Worker]] = set()  # decode, prefill
        self.ready_changed: Callable[[bool], None] = lambda _ready: None

    def of(self, role: Role) -> list[Worker]:
        return self._of_role[role]

    def paired(self) -> list[Worker]:
        """The decode workers that requests can go to: those that have read a prefill worker's pool, or can prefill."""
        return [worker for worker in self._of_role[DECODE] if worker.can_prefill or worker.reads]

    def usable(self) -> list[Worker]:
        """The workers that requests can go to: both of each pair, and decode workers that can prefill."""
        read = {instance for decode in self._of_role[DECODE] for instance in decode.reads}
        return [*(worker for worker in self._of_role[PREFILL] if worker.instance in read), *self.paired()]

    def all(self) -> list[Worker]:
        return [worker for workers in self._of_role.values() for worker in workers]

    def any(self) -> Worker | None:
        """Some worker: all that are connected have the same kind and dtype. None while there is none."""
        return next(iter(self.all()), None)

    def count(self, role: Role) -> int:
        """How many workers of a role requests can go to."""
        return sum(worker.role == role for worker in self.usable())

    def count_paused(self, role: Role) -> int:
        """How many of these are paused by their circuit breakers."""
        return sum(worker.role == role and worker.circuit.paused for worker in self.usable())

    def max_length(self) -> int | None:
        """Tokens of the longest sequence that fits every worker; None while there is no worker."""
        return min((worker.hello.max_length for worker in self.all()), default=None)

    @property
    def ready(self) -> bool:
        """Whether requests can be served: there is a pair, or a decode worker that can prefill."""
        return all(self._filled(role) for role in self._of_role)

    def gone(self) -> Role | None:
        """A role that has been without a worker for the grace period or longer; None if there is none."""
        return next((role for role in self._of_role if self._is_gone(role)), None)

    def watch(self) -> None:
        """Starts the grace period of roles that have no worker yet."""
        self._missing_since = dict.fromkeys(self._of_role, time.monotonic())
        self._call_when_gone()

    def add(self, worker: Worker) -> None:
        worker.reads, worker.unreadable = frozenset(), {}  # they may be of workers that have left since
        with self._change():
            self._of_role[worker.role].append(worker)
        if worker.role == DECODE:
            pairs = [(worker, prefill) for prefill in self._of_role[PREFILL] if prefill.host == worker.host]
            if not (pairs or worker.can_prefill):
                log.info("no prefill worker on its host yet", worker=worker.address, host=worker.host)
        else:
            pairs = [(decode, worker) for decode in self._of_role[DECODE] if decode.host == worker.host]
        for pair in pairs:
            self._ask(*pair)

    def retire(self, worker: Worker) -> None:
        """Sends nothing new to the worker. Attempts that it has go on."""
        workers = self._of_role[worker.role]
        if worker not in workers:
            return
        with self._change():
            workers.remove(worker)
            for decode in self._of_role[DECODE]:
                decode.reads -= {worker.instance}
                decode.unreadable.pop(worker.instance, None)

    def opened(self, decode: Worker, opened: worker_pb2.PoolOpened) -> None:
        """A decode worker reports whether it can read a prefill worker's pool."""
        prefill = next((worker for worker in self._of_role[PREFILL] if worker.instance == opened.instance), None)
        if prefill is None or decode not in self._of_role[DECODE]:
            return
        with self._change():
            decode.reads = decode.reads - {prefill.instance} if opened.problem else decode.reads | {prefill.instance}
        if not opened.problem:
            decode.unreadable.pop(prefill.instance, None)
            return
        if decode.unreadable.get(prefill.instance) != opened.problem:
            decode.unreadable[prefill.instance] = opened.problem
            log.error(
                "cannot read a prefill worker's KV",
                decode=decode.address,
                prefill=prefill.address,
                reason=opened.problem,
            )
        if (decode, prefill) not in self._asked_again:
            self._asked_again.add((decode, prefill))
            asyncio.get_running_loop().call_later(ASK_AGAIN_SECONDS, self._ask_again, decode, prefill)

    def _ask_again(self, decode: Worker, prefill: Worker) -> None:
        self._asked_again.remove((decode, prefill))
        if decode in self._of_role[DECODE] and prefill in self._of_role[PREFILL]:
            self._ask(decode, prefill)

    def _ask(self, decode: Worker, prefill: Worker) -> None:
        """Asks a decode worker to open a prefill worker's pool. They are a pair once it has; see `opened`."""
        decode.send_pool(prefill.hello.pool)

    @contextmanager
    def _change(self) -> Iterator[None]:
        was_ready, filled = self.ready, [role for role in self._of_role if self._filled(role)]
        yield
        if was_ready is not self.ready:
            self.ready_changed(self.ready)
        if missing := [role for role in filled if not self._filled(role)]:
            self._missing_since.update(dict.fromkeys(missing, time.monotonic()))
            self._call_when_gone()

    def _call_when_gone(self) -> None:
        asyncio.get_running_loop().call_later(self._grace, self._tell_if_gone)

    def _tell_if_gone(self) -> None:
        if self.gone() is not None:
            self._role_gone()

    def why_missing(self, role: Role) -> str:
        """A sentence about why nobody fills a role."""
        for decode in self._of_role[DECODE]:
            for problem in decode.pair_problems:
                return f"decode worker {decode.address} {problem}"
        where = " on a decode worker's host" if self._of_role[role] else ""
        return f"no {ROLE_NAMES[role]} worker is connected{where}"

    def _filled(self, role: Role) -> bool:
        """Whether the role's work can be done now."""
        if role == PREFILL and self._of_role[DECODE]:
            return bool(self.paired())  # decode workers without a pair lack a prefill worker
        return bool(self._of_role[role])

    def _is_gone(self, role: Role) -> bool:
        # With a millisecond's tolerance: a timer may fire early by the resolution of its clock.
        missing = time.monotonic() - self._missing_since[role] + 0.001
        return not self._filled(role) and missing >= self._grace
