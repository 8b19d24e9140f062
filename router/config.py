"""The router's settings; their docstrings are the help of the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, Port, PositiveInt
from cyclopts.validators import Number

from common.network.addresses import Listen, Target
from common.security.security_config import SecurityConfig

# Of a worker's engine: one that says something every second must not be taken for lost in between.
Silence = Annotated[float, Parameter(validator=Number(gt=1))]


@dataclass(frozen=True, slots=True)
class RouterConfig(SecurityConfig):
    """Settings of a router. Workers are given as addresses, or make themselves known at the router."""

    model: str = "SmolLM2-135M-Instruct"
    """Model whose tokenizer and chat template are used: the embedded one's name, a local Hugging Face directory, or
    ORG/NAME or ORG/NAME@REVISION on Hugging Face's hub."""

    listen: Listen = "127.0.0.1:8600"
    """Address to serve at, host:port. Port 0 picks a free one."""

    prefill: tuple[Target, ...] = ()
    """Addresses of prefill workers, host:port. A DNS name stands for all addresses behind it, now and later."""

    decode: tuple[Target, ...] = ()
    """Addresses of decode workers, host:port. A DNS name stands for all addresses behind it, now and later."""

    api_keys: Path | None = None
    """File of the callers' API keys, as `twostroke key` makes them. Set: nobody is served without one. Read again
    when it changes."""

    max_queue: PositiveInt = 1024
    """Most requests that wait for a worker, with 8,192 tokens in a prompt on average; one more is answered with
    RESOURCE_EXHAUSTED."""

    headroom_tokens: NonNegativeInt = 256
    """Tokens of output that an attempt reserves room for; twice as many after each preemption. More of them: fewer
    preemptions, smaller batches."""

    max_resumes: NonNegativeInt = 3
    """Times that a request survives a lost worker or lost KV; once more is UNAVAILABLE. Preemptions don't count."""

    worker_grace: NonNegativeFloat = 1.5
    """Seconds that requests wait for a worker of a role that has none; then they are answered with UNAVAILABLE."""

    worker_silence_seconds: Silence = 30.0
    """Seconds without a word from a worker's engine, which says something every second between batches, after which the
    worker is taken for lost, and its requests go on elsewhere. Longer than the slowest batch of prompts takes."""

    drain_seconds: NonNegativeFloat = 10.0
    """Seconds that running requests get to finish after SIGTERM or Ctrl-C."""

    metrics_port: Port | None = None
    """Port of Prometheus metrics, on the host of `listen`. Not set: none are served."""

    otlp_endpoint: str | None = None
    """OpenTelemetry collector that traces go to, by OTLP over gRPC: http://HOST:4317, or https. Not set: no traces.
    Needs the extra `tracing`; OpenTelemetry's own variables (OTEL_*) set the rest."""

    log_format: Literal["people", "json"] = "people"
    """How log lines look."""
