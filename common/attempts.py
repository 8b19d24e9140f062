"""What both kinds of worker do with an attempt before and after their own work on it."""

from collections.abc import Callable

import structlog

from common import causes
from common.sequence import SequenceSpec, sequence_from_proto
from common.worker_metrics import WorkerMetrics
from common.worker_parts import WorkerParts
from common.worker_service import WorkerService
from twostroke.v1 import worker_pb2 as pb

log = structlog.get_logger(__name__)

# Ends that come with every request, or with every request of a pool that is too small for all; metrics count them.
_USUAL = (pb.Ended.CAUSE_FINISHED, pb.Ended.CAUSE_PREEMPTED)


class Attempts:
    """Lets attempts in, and tells routers of their ends."""

    def __init__(self, parts: WorkerParts, service: WorkerService, metrics: WorkerMetrics) -> None:
        self._parts = parts
        self._service = service
        self._metrics = metrics

    def accept(
        self,
        connection: int,
        asked: pb.Prefill | pb.Reserve,
        length: Callable[[SequenceSpec], int],
        refusal: "pb.Ended.Cause.ValueType | None",
        under_way: bool,
    ) -> SequenceSpec | None:
        """The sequence that a router asks for; None where it cannot be served, which the router is told.

        `length` says how many tokens of it this worker will have to hold; `refusal`, why it takes none now, if that is
        so; `under_way`, that there is an attempt of this id already, which goes on.
        """
        if refusal is not None:
            self.end(connection, asked.attempt_id, refusal, request_id=asked.sequence.request_id)
            return None
        try:
            if under_way:
                raise ValueError("an attempt of this id is under way")
            spec = sequence_from_proto(asked.sequence)
            self._parts.check(spec, length(spec))
        except ValueError as error:
            self.end(connection, asked.attempt_id, pb.Ended.CAUSE_REJECTED, str(error), asked.sequence.request_id)
            return None
        return spec

    def end(
        self,
        connection: int,
        attempt_id: int,
        cause: "pb.Ended.Cause.ValueType",
        detail: str = "",
        request_id: str = "",
    ) -> None:
        """Tells the router that the attempt is over here, and that nothing is held for it any more."""
        self._metrics.ended(cause)
        self._service.outgoing(connection).ended.add(attempt_id=attempt_id, cause=cause, detail=detail)
        if cause not in _USUAL:
            log.info(
                "attempt ended", cause=causes.name_of(cause), detail=detail, request_id=request_id, attempt=attempt_id
            )
