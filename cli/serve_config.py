"""Settings of `twostroke serve`; their docstrings are its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, Port, PositiveFloat, PositiveInt

from common.network.addresses import Listen
from common.security.security_config import SecurityConfig
from common.worker.config import Device
from decode_worker.config import Drafts
from router.config import Silence


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class ServeConfig(SecurityConfig):
    """Each part gets the settings that it has by the same name, if they are set."""

    prefill_workers: NonNegativeInt = 1
    """Number of prefill workers. 0: the decode workers prefill, which --prefill-tokens must allow."""

    decode_workers: PositiveInt = 1
    """Number of decode workers."""

    devices: tuple[Device, ...] = ("auto",)
    """Devices of the workers, in turn, prefill workers first: cpu, cuda or cuda:N."""

    listen: Listen = "127.0.0.1:8600"
    """Address to serve at, host:port. Port 0 picks a free one."""

    api_keys: Path | None = None
    """File of the callers' API keys, as `twostroke key` makes them. Set: nobody is served without one."""

    model: str | None = None
    """Model to serve: a local Hugging Face directory, or ORG/NAME or ORG/NAME@REVISION on Hugging Face's hub. Not set:
    the embedded SmolLM2-135M-Instruct."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Type of weights, but for 8-bit ones, and of KV if `kv_cache_dtype` is auto. auto: the model's own on a GPU,
    bfloat16 beside 8-bit weights, float32 on a CPU."""

    kv_cache_dtype: Literal["auto", "fp8"] | None = None
    """Type of KV. fp8: 8-bit floats (e4m3), half as many bytes as with 16 bits; not for every model. auto: that of
    `dtype`."""

    load_format: Literal["auto", "dummy"] | None = None
    """dummy: random weights for the model's config.json, for benchmarks."""

    block_size: PositiveInt | None = None
    """Tokens in a KV block."""

    num_blocks: PositiveInt | None = None
    """KV blocks of each worker. Not set: 85 % of a GPU's free memory, or on a CPU a tenth of it, at most 2 GiB."""

    host_cache_gib: NonNegativeFloat | None = None
    """GiB of this machine's memory that each worker that prefills takes for copies of KV blocks, which can be loaded
    once its pool has no room for them any more; so it should be more than the pool has."""

    max_length: PositiveInt | None = None
    """Tokens of the longest sequence, prompt and output together. Not set: the model's context length."""

    max_batch_tokens: PositiveInt | None = None
    """Most tokens in one forward pass of a prefill worker. Not set: 2,048 on a GPU, 512 on a CPU."""

    lease_seconds: PositiveFloat | None = None
    """Seconds that a prefill worker holds a finished prompt's blocks for a decode worker."""

    max_batch: PositiveInt | None = None
    """Most sequences that a decode worker decodes together."""

    draft_tokens: Drafts | None = None
    """Speculative decoding: tokens that are drafted behind each, as they followed before in the same prompt or answer,
    and kept if sampling gives them as well."""

    prefill_tokens: NonNegativeInt | None = None
    """Prompts with at most this many tokens uncached on the decode worker are prefilled there, without a hand-over."""

    prefill_overflow_tokens: NonNegativeInt | None = None
    """Prompts with at most this many uncached tokens are prefilled there while all prefill workers are busy."""

    prefill_overflow_seconds: NonNegativeFloat | None = None
    """Seconds after a request's arrival before that is done for it."""

    prefill_chunk_tokens: PositiveInt | None = None
    """Most tokens of prompts that a decode worker computes between two decode steps."""

    headroom_tokens: NonNegativeInt | None = None
    """Tokens of output that an attempt reserves room for on a decode worker; doubled with each preemption."""

    max_queue: PositiveInt | None = None
    """Most requests that wait for a worker."""

    max_resumes: NonNegativeInt | None = None
    """Times that a request may lose a worker or its KV and go on."""

    worker_grace: NonNegativeFloat = 30.0
    """Seconds that requests wait for a worker of a role that has none: longer than a restart takes."""

    worker_silence_seconds: Silence | None = None
    """Seconds without a message from a worker's engine, after which its requests go on elsewhere."""

    drain_seconds: NonNegativeFloat | None = None
    """Seconds that running requests get to finish after SIGTERM or Ctrl-C."""

    transport: Literal["auto", "shm", "cuda_ipc", "nixl"] | None = None
    """How KV goes from prefill to decode workers. auto: cuda_ipc on a GPU, shm on a CPU. nixl: between hosts, too."""

    threads: PositiveInt | None = None
    """CPU threads of each worker."""

    metrics_port: Port | None = None
    """Port of the router's Prometheus metrics; the workers take those after it. Not set: none are served."""

    otlp_endpoint: str | None = None
    """OpenTelemetry collector that traces go to, by OTLP over gRPC: http://HOST:4317, or https. Not set: no traces."""

    log_format: Literal["people", "json"] | None = None
    """How log lines look."""
