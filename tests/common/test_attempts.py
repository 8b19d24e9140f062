"""What a worker says of attempts that end otherwise than they should."""

from typing import Any, cast

import structlog

from common.worker.attempts import Attempts
from common.worker.worker_service import WorkerService
from decode_worker.metrics import DecodeMetrics
from decode_worker.scheduler import Sequence
from tests.one_worker import ROUTER, Wire
from tests.specs import spec
from twostroke.v1 import worker_pb2 as pb


class Refusing:
    """The parts of a worker that can serve nothing."""

    def check(self, _spec: object, _length: int) -> None:
        raise ValueError("too long")


def attempts(wire: Wire) -> Attempts:
    return Attempts(cast(Any, Refusing()), cast(WorkerService, cast(Any, wire)), DecodeMetrics(), length=lambda _: 1)


def test_an_odd_end_is_logged_with_the_client_s_request_id() -> None:
    wire = Wire()
    asked = pb.Prefill(attempt_id=7)
    asked.sequence.MergeFrom(pb.Sequence(token_ids=[1], prompt_length=1, max_length=2, request_id="ask-1"))
    with structlog.testing.capture_logs() as lines:
        assert attempts(wire).accept(ROUTER, asked, None, under_way=False) is None
        assert attempts(wire).accept(ROUTER, asked, pb.Ended.CAUSE_DRAINING, under_way=False) is None
    assert [(line["request_id"], line["cause"], line["detail"]) for line in lines] == [
        ("ask-1", "rejected", "too long"),
        ("ask-1", "draining", ""),
    ]
    assert [ended.attempt_id for ended in wire.outgoing(ROUTER).ended] == [7, 7]


def test_usual_ends_are_counted_and_not_logged() -> None:
    wire = Wire()
    with structlog.testing.capture_logs() as lines:
        for cause in (pb.Ended.CAUSE_FINISHED, pb.Ended.CAUSE_PREEMPTED):
            attempts(wire).end(Sequence(1, ROUTER, spec([1], 4), [1]), cause)
    assert lines == []
