"""Tells routers how full a worker is: after every change, at most 20 times a second, and at least once a second."""

import time
from collections.abc import Callable

from common.worker.worker_metrics import WorkerMetrics
from common.worker.worker_service import WorkerService
from twostroke.v1 import inference_pb2

INTERVAL_SECONDS = 0.05
HEARTBEAT_SECONDS = 1.0


class LoadReport:
    """
    Args:
        service: where it is sent.
        metrics: show it, too.
        measure: the load, for all routers, of a worker that is ready or not.
        kept_from: blocks that are kept for another router than this connection's. With them it gets one place less.
    """

    def __init__(
        self,
        service: WorkerService,
        metrics: WorkerMetrics,
        measure: Callable[[bool], inference_pb2.WorkerLoad],
        kept_from: Callable[[int], int] = lambda _: 0,
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._measure = measure
        self._kept_from = kept_from
        self._last = inference_pb2.WorkerLoad()
        self._kept: dict[int, int] = {}  # by connection
        self._sent_at = 0.0

    def send_if_due(self, ready: bool) -> None:
        """Puts the load into each router's outgoing message if it has changed, or a second has gone by."""
        now = time.monotonic()
        kept = {connection: self._kept_from(connection) for connection in self._service.connections}
        new_router = kept.keys() != self._kept.keys()
        if now - self._sent_at < INTERVAL_SECONDS and not new_router:
            return
        load = self._measure(ready)
        self._metrics.load(load)
        if load == self._last and kept == self._kept and now - self._sent_at < HEARTBEAT_SECONDS:
            return
        self._last, self._kept, self._sent_at = load, kept, now
        for connection, blocks in kept.items():
            told = self._service.outgoing(connection).load
            told.CopyFrom(load)
            told.blocks.reserved += blocks
            told.waiting += blocks > 0
