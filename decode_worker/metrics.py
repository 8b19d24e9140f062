"""Prometheus metrics of a decode worker."""

from prometheus_client import Counter, Gauge, Histogram

from common.worker.worker_metrics import WorkerMetrics

SEQUENCE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HANDOVER_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1)


class DecodeMetrics(WorkerMetrics):
    def __init__(self) -> None:
        super().__init__()
        self.batch_sequences = Histogram(
            "twostroke_batch_sequences", "Sequences of a step", buckets=SEQUENCE_BUCKETS, registry=self.registry
        )
        self.output_tokens = Counter("twostroke_output_tokens", "Tokens generated", registry=self.registry)
        self.drafted_tokens = Counter(
            "twostroke_drafted_tokens", "Tokens drafted in steps of running sequences", registry=self.registry
        )
        self.kept_drafts = Counter(
            "twostroke_kept_drafts", "Drafted tokens that sampling gave as well", registry=self.registry
        )
        self.pulled_tokens = self.prompt_tokens.labels("prefill worker")
        self.handover_bytes = Counter(
            "twostroke_handover_bytes", "KV pulled from prefill workers", registry=self.registry
        )
        self.handover_seconds = Histogram(
            "twostroke_handover_seconds",
            "From the router's word that KV is ready to its arrival",
            buckets=HANDOVER_BUCKETS,
            registry=self.registry,
        )
        self.peer_speed = Gauge(
            "twostroke_peer_read_bytes_per_second",
            "Speed at which a prefill worker's pool was read when it was opened, by the worker's instance",
            ("instance",),
            registry=self.registry,
        )
