"""The workers that take work, by role, and how long a role has had none."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from router.worker import Worker
from twostroke.v1 import inference_pb2

Role: TypeAlias = inference_pb2.WorkerRole.ValueType

PREFILL = inference_pb2.WORKER_ROLE_PREFILL
DECODE = inference_pb2.WORKER_ROLE_DECODE
ROLE_NAMES: dict[Role, str] = {PREFILL: "prefill", DECODE: "decode"}


class Workers:
    """
    Args:
        grace: seconds that a role may be without a worker before it counts as gone.
        role_gone: called when one has been for so long.
    """

    def __init__(self, grace: float, role_gone: Callable[[], None]) -> None:
        self._grace = grace
        self._role_gone = role_gone
        # Decode first: where the only worker did both, and is gone, it is a decode worker that is missing.
        self._of_role: dict[Role, list[Worker]] = {DECODE: [], PREFILL: []}
        self._missing_since = dict.fromkeys(self._of_role, time.monotonic())
        self.ready_changed: Callable[[bool], None] = lambda _ready: None

    def of(self, role: Role) -> list[Worker]:
        return self._of_role[role]

    def paired(self) -> list[Worker]:
        """Decode workers that requests can go to: KV does not leave a host, so each needs a prefill worker on its own,
        or prefills itself."""
        hosts = {worker.host for worker in self._of_role[PREFILL]}
        return [worker for worker in self._of_role[DECODE] if worker.can_prefill or worker.host in hosts]

    def all(self) -> list[Worker]:
        return [worker for workers in self._of_role.values() for worker in workers]

    def count(self, role: Role) -> int:
        return len(self._of_role[role])

    def count_paused(self, role: Role) -> int:
        return sum(worker.circuit.paused for worker in self._of_role[role])

    def smallest_pool(self) -> int | None:
        """Tokens of the longest sequence that every worker can hold; None while there is no worker."""
        return min((worker.hello.max_length for worker in self.all()), default=None)

    @property
    def ready(self) -> bool:
        """There is a worker of each role on one host, or one that does both."""
        return all(self._filled(role) for role in self._of_role)

    def gone(self) -> Role | None:
        """A role that has had no worker for longer than its grace."""
        return next((role for role in self._of_role if self._is_gone(role)), None)

    def watch(self) -> None:
        """Starts the clock for the roles that have no worker yet."""
        self._missing_since = dict.fromkeys(self._of_role, time.monotonic())
        self._call_when_gone()

    def add(self, worker: Worker) -> None:
        with self._change():
            self._of_role[worker.role].append(worker)

    def retire(self, worker: Worker) -> None:
        """Nothing new goes to it."""
        workers = self._of_role[worker.role]
        if worker not in workers:
            return
        with self._change():
            workers.remove(worker)

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

    def _filled(self, role: Role) -> bool:
        """Whether somebody does this role's part."""
        if role == PREFILL and self._of_role[DECODE]:
            return bool(self.paired())  # a decode worker on another host makes it a prefill worker that is missing
        return bool(self._of_role[role])

    def _is_gone(self, role: Role) -> bool:
        # A millisecond's tolerance: the timer that asks may be early by its clock's resolution.
        missing = time.monotonic() - self._missing_since[role] + 0.001
        return not self._filled(role) and missing >= self._grace
