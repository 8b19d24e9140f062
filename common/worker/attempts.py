"""What both kinds of worker do with an attempt at its beginning and at its end."""

from collections.abc import Callable
from typing import Protocol

import structlog

from common.sequence import SequenceSpec, sequence_from_proto
from common.worker import causes
from common.worker.worker_metrics import WorkerMetrics
from common.worker.worker_parts import WorkerParts
from common.worker.worker_service import WorkerService
from twostroke.v1 import worker_pb2 as pb

log = structlog.get_logger(__name__)

# Ends that are no news, so they are not logged: they come with every request, or whenever a pool is short of blocks.
_USUAL = (pb.Ended.CAUSE_FINISHED, pb.Ended.CAUSE_PREEMPTED)


class Attempt(Protocol):
    """What both kinds of worker know of an attempt that they accepted."""

    attempt_id: int
    connection: int  # of the router that asked for it
    spec: SequenceSpec


class Attempts:
    """Accepts attempts, and tells routers how they end.

    Args:
        parts: say what can be served.
        service: where routers are told.
        metrics: count the ends.
        length: gives the number of tokens of a sequence that this worker will have to hold.
    """

    def __init__(
        self,
        parts: WorkerParts,
        service: WorkerService,
        metrics: WorkerMetrics,
        length: Callable[[SequenceSpec], int],
    ) -> None:
        self._parts = parts
        self._service = service
        self._metrics = metrics
        self._length = length

    def accept(
        self,
        connection: int,
        asked: pb.Prefill | pb.Reserve,
        refusal: "pb.Ended.Cause.ValueType | None",
        under_way: bool,
    ) -> SequenceSpec | None:
        """The sequence that a router asks for; None if it cannot be served, and then the router is told so.

        Args:
            connection: the router's.
            asked: its message.
            refusal: why the worker takes no attempts now, if it does not.
            under_way: there is an attempt of this id already. That one goes on.
        """
        if refusal is not None:
            self._tell(connection, asked.attempt_id, refusal, "", asked.sequence.request_id)
            return None
        try:
            if under_way:
                raise ValueError("an attempt of this id is under way")
            spec = sequence_from_proto(asked.sequence)
            self._parts.check(spec, self._length(spec))
        except ValueError as error:
            self._tell(connection, asked.attempt_id, pb.Ended.CAUSE_REJECTED, str(error), asked.sequence.request_id)
            return None
        return spec

    def end(self, attempt: Attempt, cause: "pb.Ended.Cause.ValueType", detail: str = "") -> None:
        """Tells the router that the attempt is over here, and that the worker holds nothing for it any more."""
        self._tell(attempt.connection, attempt.attempt_id, cause, detail, attempt.spec.request_id)

    def _tell(
        self, connection: int, attempt_id: int, cause: "pb.Ended.Cause.ValueType", detail: str, request_id: str
    ) -> None:
        self._metrics.ended(cause)
        self._service.outgoing(connection).ended.add(attempt_id=attempt_id, cause=cause, detail=detail)
        if cause not in _USUAL:
            log.info(
                "attempt ended", cause=causes.name_of(cause), detail=detail, request_id=request_id, attempt=attempt_id
            )
