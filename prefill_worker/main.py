"""Starts a prefill worker: model, pool, service, loop."""

import structlog

from common import garbage, lifecycle
from common.network import peers
from common.telemetry import logs, tracing
from common.worker import worker_parts
from common.worker.worker_service import WorkerService
from prefill_worker import graphs
from prefill_worker.config import PrefillConfig
from prefill_worker.engine import Engine
from prefill_worker.metrics import PrefillMetrics
from prefill_worker.runner import Runner
from twostroke.v1 import inference_pb2

log = structlog.get_logger(__name__)


def main(config: PrefillConfig) -> None:
    """Runs until a signal ends it."""
    logs.configure(config.log_format)
    lifecycle.end_in_order()
    known = peers.of_worker(config)
    spans = tracing.start(config.otlp_endpoint, "twostroke-prefill-worker")
    passes = graphs.passes(config.max_batch_tokens)
    parts = worker_parts.load(config, inference_pb2.WORKER_ROLE_PREFILL, config.max_batch_tokens, passes)
    try:
        runner = Runner(parts)
        runner.capture(config.max_batch_tokens)
        service = WorkerService(parts.hello, config, known)
        life = lifecycle.Lifecycle(lambda: service.set_serving(False), service.wake, config.drain_seconds)
        metrics = PrefillMetrics()
        metrics.serve(config, known.certificates)
        garbage.forget_start()
        service.set_serving(True)
        log.info("prefill worker ready", address=service.address, instance=parts.hello.instance)
        try:
            engine = Engine(parts, service, runner, metrics, spans, config.max_batch_tokens, config.lease_seconds)
            engine.run(life)
        finally:
            service.stop()
            spans.stop()
    finally:
        parts.close()
