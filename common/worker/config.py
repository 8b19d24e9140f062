"""Settings that both kinds of worker have; their docstrings are the help of the command line."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, Port, PositiveInt

from common.network.addresses import Listen, Target
from common.security.security_config import SecurityConfig

DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


def _is_device(_type: Any, device: str) -> None:
    if not DEVICE.fullmatch(device):
        raise ValueError("Must be auto, cpu, cuda or cuda:N.")


Device: TypeAlias = Annotated[str, Parameter(validator=_is_device)]


@dataclass(frozen=True, slots=True)
class WorkerConfig(SecurityConfig):
    """Settings of a worker, fixed at its start."""

    model: str = "SmolLM2-135M-Instruct"
    """Model to serve: the embedded one's name, a local Hugging Face directory, or ORG/NAME or ORG/NAME@REVISION on
    Hugging Face's hub."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights, but for 8-bit ones, and of KV if `kv_cache_dtype` is auto. auto: the model's own on a GPU,
    bfloat16 beside 8-bit weights, float32 on a CPU."""

    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Type of KV. fp8: 8-bit floats (e4m3), half as many bytes as with 16 bits; not for every model. Equal on all
    workers of a cluster. auto: that of `dtype`."""

    device: Device = "auto"
    """cpu, cuda or cuda:N. auto: cuda where there is one."""

    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights for the model's config.json, for benchmarks."""

    listen: Listen = "127.0.0.1:0"
    """Address to serve routers at, host:port. Port 0 picks a free one."""

    advertise: Target | None = None
    """Address that routers are told, host:port. Not set: that of `listen`; if that is every address of this machine,
    the one that leads to the router."""

    router: tuple[Target, ...] = ()
    """Addresses of routers to register with, host:port. Not set: a router has this worker's address in its settings."""

    insecure: bool = False
    """Listen where other machines can reach this worker, although no secret and no certificates keep strangers out."""

    block_size: PositiveInt = 16
    """Tokens in a KV block. Equal on all workers of a cluster."""

    num_blocks: PositiveInt | None = None
    """KV blocks in the pool. Not set: 85 % of a GPU's free memory, or on a CPU a tenth of it, at most 2 GiB."""

    host_cache_gib: NonNegativeFloat = 0.0
    """GiB of the host's memory for copies of KV blocks, which can be loaded once the pool has no room for them any
    more; so it should be more than the pool has. Decode workers that never prefill take none."""

    max_length: PositiveInt | None = None
    """Tokens of the longest sequence, prompt and output together. Not set: the model's context length, or the whole
    pool if that is less."""

    transport: Literal["auto", "shm", "cuda_ipc", "nixl"] = "auto"
    """How KV goes from prefill to decode workers. auto: cuda_ipc on a GPU, shm on a CPU. nixl: between hosts, too."""

    threads: PositiveInt | None = None
    """CPU threads of torch. Not set: torch's own choice."""

    drain_seconds: NonNegativeFloat = 30.0
    """Seconds that running requests get to finish after SIGTERM."""

    metrics_port: Port | None = None
    """Port of Prometheus metrics, on the host of `listen`. Not set: none are served."""

    otlp_endpoint: str | None = None
    """OpenTelemetry collector that traces go to, by OTLP over gRPC: http://HOST:4317, or https. Not set: no traces.
    Needs the extra `tracing`; OpenTelemetry's own variables (OTEL_*) set the rest."""

    log_format: Literal["people", "json"] = "people"
    """How log lines look."""
