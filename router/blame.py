"""Whose fault the end of an attempt may be, and what a worker's circuit hears of it."""

import time
from collections.abc import Container

import structlog

from router.request import Attempt
from router.worker import Worker
from twostroke.v1 import worker_pb2

log = structlog.get_logger(__name__)

# Causes that say nothing against the worker or the request: they are not counted as faults.
HARMLESS = {worker_pb2.Ended.CAUSE_PREEMPTED, worker_pb2.Ended.CAUSE_DRAINING, worker_pb2.Ended.CAUSE_FULL}
# Faults that may well be another's than the worker's that tells of them: its circuit does not count them.
ANYBODYS = {worker_pb2.Ended.CAUSE_LEASE_LOST, worker_pb2.Ended.CAUSE_REJECTED}


def suspects(worker: Worker, attempt: Attempt) -> list[Worker]:
    """Whose fault it may be that the worker ended the attempt: while KV is handed over, also that of whom it is read
    from."""
    handing_over = attempt.prefilled is not None and attempt.decoding_since is None
    if worker is attempt.decode and attempt.prefill is not None and handing_over:
        return [worker, attempt.prefill]
    return [worker]


def did_well(worker: Worker, attempt: Attempt) -> None:
    if worker.circuit.succeeded(attempt.id):
        log.info("worker does well again", worker=worker.address)


def does_well(worker: Worker) -> None:
    """A decode worker's probe that has run for as long as the pause before it has shown enough: its answer may take
    minutes, and nothing else would go there meanwhile."""
    probe = worker.circuit.probe
    attempt = None if probe is None else worker.attempts.get(probe)
    if attempt is None or attempt.decoding_since is None:
        return
    if time.monotonic() - attempt.decoding_since >= worker.circuit.pause:
        did_well(worker, attempt)


def did_badly(worker: Worker, attempt_ids: Container[int]) -> None:
    if pause := worker.circuit.failed(attempt_ids):
        log.warning("worker keeps failing; others are preferred for a while", worker=worker.address, seconds=pause)
