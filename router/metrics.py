"""The router's Prometheus metrics."""

from prometheus_client import Counter, Gauge, Histogram

from common.telemetry import metrics_server
from common.telemetry.plain_histogram import PlainHistogram

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# As the answer's `Timing` names them.
PHASES = ("queued", "reserved", "prefill", "transfer", "decode")

PHASE_BUCKETS = (0.0002, 0.0005, 0.001, 0.0025, *LATENCY_BUCKETS)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """One set per router; `registry` is what is served."""

    def __init__(self) -> None:
        self.registry = metrics_server.new_registry()
        self.first_token = Histogram(
            "twostroke_first_token_seconds",
            "From a choice's arrival to its first token (TTFT)",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.inter_token = PlainHistogram(
            "twostroke_inter_token_seconds",
            "Between deltas of a choice that carry tokens, whatever their number (ITL)",
            buckets=TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.end_to_end = Histogram(
            "twostroke_request_seconds",
            "From a choice's arrival to its end",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        phases = Histogram(
            "twostroke_phase_seconds",
            "A phase of a choice that was answered, over all its attempts",
            ("phase",),
            buckets=PHASE_BUCKETS,
            registry=self.registry,
        )
        self.phases = {phase: phases.labels(phase) for phase in PHASES}
        self.calls = Counter(
            "twostroke_calls", "Calls that ended, by gRPC status code", ("method", "code"), registry=self.registry
        )
        self.prompt_tokens = Counter("twostroke_prompt_tokens", "Tokens of accepted prompts", registry=self.registry)
        self.output_tokens = Counter("twostroke_output_tokens", "Tokens given to clients", registry=self.registry)
        self.resumes = Counter(
            "twostroke_resumes", "Attempts cut short and resumed, by cause", ("cause",), registry=self.registry
        )
        self.queued = Gauge("twostroke_queued", "Choices that no worker has yet", registry=self.registry)
        self.queued_prompt_tokens = Gauge(
            "twostroke_queued_prompt_tokens",
            "Tokens in the prompts of choices that no worker has yet",
            registry=self.registry,
        )
        self.running = Gauge("twostroke_running", "Choices that workers hold", registry=self.registry)
        self.workers = Gauge(
            "twostroke_workers",
            "Workers that take requests: those of a pair, and decode workers that prefill",
            ("role",),
            registry=self.registry,
        )
        self.workers_paused = Gauge(
            "twostroke_workers_paused",
            "Those of them that kept failing and are left alone for a while",
            ("role",),
            registry=self.registry,
        )
