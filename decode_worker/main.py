"""Starts a decode worker: model, pool, graphs, service, loop."""

from dataclasses import replace

import structlog

from common import garbage, lifecycle
from common.network import peers
from common.telemetry import logs, tracing
from common.worker import worker_parts
from common.worker.worker_service import WorkerService
from decode_worker import graphs
from decode_worker.config import DecodeConfig
from decode_worker.engine import Engine
from decode_worker.metrics import DecodeMetrics
from decode_worker.own_prompts import OwnPrompts
from decode_worker.runner import Runner
from prefill_worker import graphs as prompt_graphs
from prefill_worker.runner import Runner as PromptRunner
from twostroke.v1 import inference_pb2

log = structlog.get_logger(__name__)


def main(config: DecodeConfig) -> None:
    """Runs until a signal ends it."""
    logs.configure(config.log_format)
    lifecycle.end_in_order()
    known = peers.of_worker(config)
    spans = tracing.start(config.otlp_endpoint, "twostroke-decode-worker")
    prefills = bool(config.prefill_tokens or config.prefill_overflow_tokens)
    passes = graphs.passes(config.max_batch, config.draft_tokens)
    if prefills:
        passes += prompt_graphs.passes(config.prefill_chunk_tokens)
    elif config.host_cache_gib:
        log.info("takes no memory of the host for KV: this worker never prefills, and would find nothing there")
        config = replace(config, host_cache_gib=0.0)
    parts = worker_parts.load(config, inference_pb2.WORKER_ROLE_DECODE, config.max_batch, passes)
    parts.hello.prefill_tokens = config.prefill_tokens
    parts.hello.prefill_overflow_tokens = config.prefill_overflow_tokens
    parts.hello.prefill_overflow_seconds = config.prefill_overflow_seconds
    try:
        runner = Runner(parts, config.max_batch, config.draft_tokens)
        prompt_runner = PromptRunner(parts)
        if prefills:
            prompt_runner.capture(config.prefill_chunk_tokens)
        own_prompts = OwnPrompts(parts, prompt_runner, config.prefill_chunk_tokens)
        service = WorkerService(parts.hello, config, known)
        life = lifecycle.Lifecycle(lambda: service.set_serving(False), service.wake, config.drain_seconds)
        metrics = DecodeMetrics()
        metrics.serve(config, known.certificates)
        garbage.forget_start()
        service.set_serving(True)
        log.info("decode worker ready", address=service.address, instance=parts.hello.instance)
        try:
            Engine(parts, service, runner, own_prompts, metrics, spans, config.max_batch).run(life)
        finally:
            service.stop()
            spans.stop()
    finally:
        parts.close()
