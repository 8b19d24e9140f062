"""Starts a decode worker: model, pool, graphs, service, loop."""

from contextlib import closing
from dataclasses import replace

import structlog

from common import signals
from common.telemetry import logs, tracing
from common.worker.loading import load
from common.worker.serving import serving
from common.worker.worker_peers import worker_peers
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
    signals.end_in_order()
    peers = worker_peers(config)
    spans = tracing.start(config.otlp_endpoint, "twostroke-decode-worker")
    prefills = bool(config.prefill_tokens or config.prefill_overflow_tokens)
    passes = graphs.passes(config.max_batch, config.draft_tokens)
    if prefills:
        passes += prompt_graphs.passes(config.prefill_chunk_tokens)
    elif config.host_cache_gib:
        log.info("takes no memory of the host for KV: this worker never prefills, and would find nothing there")
        config = replace(config, host_cache_gib=0.0)
    with closing(load(config, inference_pb2.WORKER_ROLE_DECODE, config.max_batch, passes)) as parts:
        parts.hello.prefill_tokens = config.prefill_tokens
        parts.hello.prefill_overflow_tokens = config.prefill_overflow_tokens
        parts.hello.prefill_overflow_seconds = config.prefill_overflow_seconds
        runner = Runner(parts, config.max_batch, config.draft_tokens)
        prompt_runner = PromptRunner(parts)
        if prefills:
            prompt_runner.capture(config.prefill_chunk_tokens)
        own_prompts = OwnPrompts(parts, prompt_runner, config.prefill_chunk_tokens)
        metrics = DecodeMetrics()
        with serving(parts, config, peers, spans, metrics) as (service, lifecycle):
            log.info("decode worker ready", address=service.address, instance=parts.hello.instance)
            Engine(parts, service, runner, own_prompts, metrics, spans, config.max_batch).run(lifecycle)
