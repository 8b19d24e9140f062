"""Tells routers how full a worker is: after every change, at most 20 times a second, and at least once a second."""

import time
from collections.abc import Callable

from common.worker.worker_metrics import WorkerMetrics
from common.worker.worker_service import WorkerService
from twostroke.v1 import inference_pb2

INTERVAL_SECONDS = 0.05
HEARTBEAT_SECONDS = 1.0


class LoadReport:
    def __init__(
        self, service: WorkerService, metrics: WorkerMetrics, measure: Callable[[], inference_pb2.WorkerLoad]
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._measure = measure
        self._last = inference_pb2.WorkerLoad()
        self._connections: tuple[int, ...] = ()
        self._sent_at = 0.0

    def send_if_due(self) -> None:
        """Puts the load into each router's outgoing message if it has changed, or a second has gone by."""
        now = time.monotonic()
        connections = self._service.connections
        new_router = connections != self._connections
        if now - self._sent_at < INTERVAL_SECONDS and not new_router:
            return
        load = self._measure()
        self._metrics.load(load)
        if load == self._last and not new_router and now - self._sent_at < HEARTBEAT_SECONDS:
            return
        self._last, self._connections, self._sent_at = load, connections, now
        for connection in connections:
            self._service.outgoing(connection).load.CopyFrom(load)
