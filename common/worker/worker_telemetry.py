"""What is counted and traced of the prompts that a worker prefills."""

from common.telemetry.tracing import Span
from common.worker.worker_metrics import WorkerMetrics
from twostroke.v1 import inference_pb2


class WorkerTelemetry:
    """One object per worker, told of every phase of an attempt that has ended.

    Args:
        metrics: where tokens are counted.
        address: of the worker, which spans name.

    Attributes:
        totals: tokens since the worker's start, as routers are told of them.
    """

    def __init__(self, metrics: WorkerMetrics, address: str) -> None:
        self.totals = inference_pb2.Totals()
        self._metrics = metrics
        self._address = address

    def prefilled(self, trace: Span, received_at: float, length: int, cached: int, loaded: int) -> None:
        """A prompt's KV and its first token were computed here.

        Args:
            trace: the attempt's span.
            received_at: when its message came, time.monotonic().
            length: tokens of the prompt.
            cached: those of them whose KV was on this worker already, in its pool or in host memory.
            loaded: those of the cached ones that were in host memory only.
        """
        self._metrics.cached_tokens.inc(cached - loaded)
        self._metrics.loaded_tokens.inc(loaded)
        self._metrics.computed_tokens.inc(length - cached)
        self.totals.prompt_tokens += length
        self.totals.cached_tokens += cached
        self.totals.prefilled_tokens += length
        self.totals.output_tokens += 1
        trace.record(
            "prefill",
            received_at,
            {
                "twostroke.worker": self._address,
                "twostroke.input_tokens": length,
                "twostroke.cached_tokens": cached,
                "twostroke.loaded_tokens": loaded,
            },
        )
