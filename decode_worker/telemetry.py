"""What is counted and traced of the sequences that a decode worker runs."""

import time

from common.kv.kv_pool import KvLayout
from common.worker.worker_telemetry import WorkerTelemetry
from decode_worker.loop import StepTokens
from decode_worker.metrics import DecodeMetrics
from decode_worker.pulls import Pulled
from decode_worker.scheduler import Sequence


class DecodeTelemetry(WorkerTelemetry):
    """Adds KV that was pulled and steps that were decoded. `layout` is that of the worker's pool."""

    _metrics: DecodeMetrics

    def __init__(self, metrics: DecodeMetrics, address: str, layout: KvLayout) -> None:
        super().__init__(metrics, address)
        self._layout = layout

    def prefilled_own(self, sequence: Sequence, cached: int, loaded: int) -> None:
        """A sequence's prompt was prefilled here; `cached` and `loaded` are of its tokens, as in `prefilled`."""
        self.prefilled(sequence.trace, sequence.received_at, sequence.kv_len, cached, loaded)
        self._metrics.output_tokens.inc()

    def pulled(self, pulled: Pulled) -> None:
        """A pull is over. To be told while the sequence still has its blocks."""
        sequence = pulled.sequence
        blocks = len(sequence.blocks) - sequence.cached_blocks
        if not pulled.problem:
            cached = sequence.cached_blocks * self._layout.block_size
            self._metrics.cached_tokens.inc(cached)
            self._metrics.pulled_tokens.inc(sequence.kv_len - cached)
            self._metrics.handover_bytes.inc(blocks * self._layout.block_bytes)
            self._metrics.handover_seconds.observe(pulled.milliseconds / 1000)
            self.totals.prompt_tokens += sequence.kv_len
            self.totals.cached_tokens += cached
        sequence.trace.record(
            "transfer",
            time.monotonic() - pulled.milliseconds / 1000,
            {"twostroke.worker": self._address, "twostroke.blocks": blocks},
            pulled.problem,
        )

    def stepped(self, step: StepTokens) -> None:
        """A step gave its tokens."""
        self._metrics.batch_sequences.observe(step.batch)
        if step.drafts:
            self._metrics.drafted_tokens.inc(step.batch * step.drafts)
            self._metrics.kept_drafts.inc(len(step.tokens) - step.batch)
        self._metrics.output_tokens.inc(len(step.tokens))
        self.totals.output_tokens += len(step.tokens)

    def decoded(self, sequence: Sequence, outcome: str) -> None:
        """A running sequence left the batch. Its first token does not count: that was sampled by the prefill."""
        sequence.trace.record(
            "decode",
            sequence.running_since,
            {
                "twostroke.worker": self._address,
                "twostroke.outcome": outcome,
                "twostroke.output_tokens": len(sequence.tokens) - len(sequence.spec.token_ids) - 1,
            },
        )
