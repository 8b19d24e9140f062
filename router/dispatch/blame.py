"""Which workers may be at fault when an attempt ends, and what their circuit breakers are told of it."""

import time
from collections.abc import Container

import structlog

from router.cluster.worker import Worker
from router.dispatch.request import Attempt
from twostroke.v1 import worker_pb2

log = structlog.get_logger(__name__)

# Causes that are no fault, neither of the worker nor of the request.
_NO_FAULT = {worker_pb2.Ended.CAUSE_PREEMPTED, worker_pb2.Ended.CAUSE_DRAINING, worker_pb2.Ended.CAUSE_FULL}
# Faults for which the worker that reports them may not be responsible: its circuit breaker does not count them.
AMBIGUOUS = {worker_pb2.Ended.CAUSE_LEASE_LOST, worker_pb2.Ended.CAUSE_REJECTED}


def is_fault(attempt: Attempt, cause: worker_pb2.Ended.Cause.ValueType) -> bool:
    """Whether a worker may be at fault for the end of the attempt.

    Only sequences that have begun to decode are preempted. An attempt that is, before it brought a token, would be
    followed by others like it without end.
    """
    if cause == worker_pb2.Ended.CAUSE_PREEMPTED:
        return attempt.request.length == attempt.length
    return cause not in _NO_FAULT


def suspects(worker: Worker, attempt: Attempt) -> list[Worker]:
    """The workers that may be at fault when `worker` reports the end of the attempt: while KV is handed over, also the
    prefill worker that it is pulled from."""
    handing_over = attempt.prefilled is not None and attempt.decoding_since is None
    if worker is attempt.decode and attempt.prefill is not None and handing_over:
        return [worker, attempt.prefill]
    return [worker]


def attempt_succeeded(worker: Worker, attempt: Attempt) -> None:
    if worker.circuit.succeeded(attempt.id):
        log.info("worker does well again", worker=worker.address)


def check_probe(worker: Worker) -> None:
    """Counts the probe of a decode worker as a success once it has been decoding for as long as the last pause. Its
    answer may take minutes more, and until the probe succeeds nothing else is sent there."""
    probe = worker.circuit.probe
    attempt = None if probe is None else worker.attempts.get(probe)
    if attempt is None or attempt.decoding_since is None:
        return
    if time.monotonic() - attempt.decoding_since >= worker.circuit.pause:
        attempt_succeeded(worker, attempt)


def attempts_failed(worker: Worker, attempt_ids: Container[int]) -> None:
    """Counts one failure: of one attempt, or of the worker with all that it had."""
    if pause := worker.circuit.failed(attempt_ids):
        log.warning("worker keeps failing; others are preferred for a while", worker=worker.address, seconds=pause)
