"""Prometheus metrics that both kinds of worker have."""

from prometheus_client import Counter, Gauge

from common.security.certificates import Certificates
from common.telemetry import metrics_server
from common.worker import causes
from common.worker.config import WorkerConfig
from twostroke.v1 import inference_pb2
from twostroke.v1 import worker_pb2 as pb


class WorkerMetrics:
    """One set per worker. Each kind of worker adds its own metrics to `registry`."""

    def __init__(self) -> None:
        self.registry = metrics_server.new_registry()
        blocks = Gauge("twostroke_blocks", "KV blocks of the pool, by state", ("state",), registry=self.registry)
        self._blocks = {state: blocks.labels(state) for state in ("free", "cached", "in_use", "reserved")}
        host_blocks = Gauge(
            "twostroke_host_blocks",
            "KV blocks of the cache in host memory, by state",
            ("state",),
            registry=self.registry,
        )
        self._host_blocks = {state: host_blocks.labels(state) for state in ("free", "cached", "in_use")}
        self._waiting = Gauge("twostroke_waiting", "Attempts that wait in this worker", registry=self.registry)
        self._running = Gauge("twostroke_running", "Attempts in this worker's batch", registry=self.registry)
        self._leases = Gauge(
            "twostroke_leases", "Finished prompts whose blocks wait to be taken", registry=self.registry
        )
        self._ended = Counter(
            "twostroke_attempts_ended", "Attempts that this worker ended, by cause", ("cause",), registry=self.registry
        )

        self.prompt_tokens = Counter(
            "twostroke_prompt_tokens", "Prompt tokens, by where their KV came from", ("source",), registry=self.registry
        )
        self.computed_tokens = self.prompt_tokens.labels("computed")
        self.cached_tokens = self.prompt_tokens.labels("cache")
        self.loaded_tokens = self.prompt_tokens.labels("host memory")

    def ended(self, cause: "pb.Ended.Cause.ValueType") -> None:
        self._ended.labels(causes.name_of(cause)).inc()

    def load(self, load: inference_pb2.WorkerLoad) -> None:
        self._waiting.set(load.waiting)
        self._running.set(load.running)
        self._leases.set(load.leases)
        for state, gauge in self._blocks.items():
            gauge.set(getattr(load.blocks, state))
        for state, gauge in self._host_blocks.items():
            gauge.set(getattr(load.host_blocks, state))

    def serve(self, config: WorkerConfig, certificates: Certificates) -> None:
        """Serves the metrics at `config.metrics_port`, if it is set.

        Raises:
            AddressError: the port is taken.
        """
        metrics_server.serve(self.registry, config.listen, config.metrics_port, certificates)
