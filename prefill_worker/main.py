"""Starts a prefill worker: model, pool, service, loop."""

import structlog
import torch

from common import garbage, lifecycle
from common.device.devices import choose_device
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
    max_batch_tokens = config.max_batch_tokens or default_batch_tokens(choose_device(config.device))
    passes = graphs.passes(max_batch_tokens)
    parts = worker_parts.load(config, inference_pb2.WORKER_ROLE_PREFILL, max_batch_tokens, passes)
    try:
        runner = Runner(parts)
        runner.capture(max_batch_tokens)
        service = WorkerService(parts.hello, config, known)
        life = lifecycle.Lifecycle(lambda: service.set_serving(False), service.wake, config.drain_seconds)
        metrics = PrefillMetrics()
        metrics.serve(config, known.certificates)
        garbage.forget_start()
        service.set_serving(True)
        log.info("prefill worker ready", address=service.address, instance=parts.hello.instance)
        try:
            engine = Engine(parts, service, runner, metrics, spans, max_batch_tokens, config.lease_seconds)
            engine.run(life)
        finally:
            service.stop()
            spans.stop()
    finally:
        parts.close()


def default_batch_tokens(device: torch.device) -> int:
    """Most tokens in one forward pass where no setting says.

    2,048 fill a GPU. A CPU is as fast with 512, and takes seconds for those. All that time the worker takes no message;
    after half a minute the router would take it for lost, together with the prompt.
    """
    return 2048 if device.type == "cuda" else 512
