"""A prefill worker, whole but for gRPC: the test makes the engine's turns, and is its router."""

from typing import Any, cast

from common.telemetry.tracing import Tracing
from common.worker.worker_parts import WorkerParts
from common.worker.worker_service import Received, WorkerService
from prefill_worker.engine import Engine
from prefill_worker.metrics import PrefillMetrics
from prefill_worker.runner import Runner
from tests.one_worker import ROUTER, Wire
from twostroke.v1 import worker_pb2 as pb


class OnePrefillWorker:
    def __init__(self, parts: WorkerParts, max_batch_tokens: int) -> None:
        self.parts = parts
        self._wire = Wire()
        service = cast(WorkerService, cast(Any, self._wire))
        self._engine = Engine(
            parts, service, Runner(parts), PrefillMetrics(), Tracing(), max_batch_tokens, lease_seconds=60
        )

    def send(self, *messages: pb.RouterMessage | None) -> None:
        """The worker sees them in its next turn; None: the router goes."""
        self._wire.to_worker += [Received(ROUTER, message) for message in messages]

    def turn(self) -> pb.WorkerMessage:
        """What the worker says in it."""
        self._engine.turn(draining=False)
        self._wire.flush()
        return self._wire.to_router.pop()

    @property
    def pending_tokens(self) -> int:
        """As routers are told."""
        return self._engine._load(ready=True).pending_tokens

    @property
    def idle(self) -> bool:
        return not self._wire.to_worker and self._engine._idle
