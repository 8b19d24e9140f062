"""A worker in service: its order of starting to listen and of stopping."""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from common import garbage
from common.network.peers import Peers
from common.telemetry.tracing import Tracing
from common.worker.config import WorkerConfig
from common.worker.lifecycle import Lifecycle
from common.worker.worker_metrics import WorkerMetrics
from common.worker.worker_parts import WorkerParts
from common.worker.worker_service import WorkerService

log = structlog.get_logger(__name__)


@contextmanager
def serving(
    parts: WorkerParts, config: WorkerConfig, peers: Peers, spans: Tracing, metrics: WorkerMetrics
) -> Iterator[tuple[WorkerService, Lifecycle]]:
    """Listens, and stops listening when the block ends. The first signal makes health say so at once.

    Raises:
        AddressError: one of the addresses in `config` cannot be listened on.
    """
    service = WorkerService(parts.hello, config, peers)
    lifecycle = Lifecycle(lambda: service.set_serving(False), service.wake, config.drain_seconds)
    metrics.serve(config, peers.certificates)
    garbage.forget_start()
    service.set_serving(True)
    if not config.router:
        log.info(
            "no --router is named: only routers that are told this worker's address, by --prefill or --decode, use it",
            address=service.address,
        )
    try:
        yield service, lifecycle
    finally:
        service.stop()
        spans.stop()
