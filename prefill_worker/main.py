"""Starts a prefill worker: model, pool, service, loop."""

from contextlib import closing

import structlog
import torch

from common import signals
from common.device.devices import choose_device
from common.telemetry import logs, tracing
from common.worker.loading import load
from common.worker.serving import serving
from common.worker.worker_peers import worker_peers
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
    signals.end_in_order()
    peers = worker_peers(config)
    spans = tracing.start(config.otlp_endpoint, "twostroke-prefill-worker")
    max_batch_tokens = config.max_batch_tokens or default_batch_tokens(choose_device(config.device))
    passes = graphs.passes(max_batch_tokens)
    with closing(load(config, inference_pb2.WORKER_ROLE_PREFILL, max_batch_tokens, passes)) as parts:
        runner = Runner(parts)
        runner.capture(max_batch_tokens)
        metrics = PrefillMetrics()
        with serving(parts, config, peers, spans, metrics) as (service, lifecycle):
            log.info("prefill worker ready", address=service.address, instance=parts.hello.instance)
            engine = Engine(parts, service, runner, metrics, spans, max_batch_tokens, config.lease_seconds)
            engine.run(lifecycle)


def default_batch_tokens(device: torch.device) -> int:
    """Most tokens in one forward pass where no setting says.

    2,048 fill a GPU. A CPU is as fast with 512, and takes seconds for those. All that time the worker takes no message;
    after half a minute the router would take it for lost, together with the prompt.
    """
    return 2048 if device.type == "cuda" else 512
