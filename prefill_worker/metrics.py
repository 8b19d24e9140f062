"""Prometheus metrics of a prefill worker."""

from prometheus_client import Histogram

from common.worker.worker_metrics import WorkerMetrics

TOKEN_BUCKETS = (16, 64, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384)


class PrefillMetrics(WorkerMetrics):
    def __init__(self) -> None:
        super().__init__()
        self.batch_tokens = Histogram(
            "twostroke_batch_tokens", "Tokens of a prefill batch", buckets=TOKEN_BUCKETS, registry=self.registry
        )
