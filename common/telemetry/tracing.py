"""Spans of what happens to a request. Those of this module do nothing and need no packages: tracing is off.
common/telemetry/otlp_tracing.py has those that are sent to a collector."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from common.security.security_config import SettingsError
from common.start_error import StartError

# Never a prompt, an answer or a token: spans leave the cluster.
Attributes: TypeAlias = Mapping[str, str | int | Sequence[str]]


class Span:
    """Something under way that takes time."""

    traceparent = ""  # as W3C defines it, for other parts to add spans below this one

    def child(self, name: str, attributes: Attributes) -> "Span":
        """Begins a span below this one."""
        return self

    def record(self, name: str, began: float, attributes: Attributes, problem: str = "") -> None:
        """Adds a span below this one, from `began` (time.monotonic()) until now; with a `problem` it failed."""

    def note(self, attributes: Attributes) -> None:
        """Adds attributes."""

    def end(self, attributes: Attributes, problem: str = "") -> None:
        """Ends it; with a `problem` it failed."""


OFF = Span()


class Tracing:
    """Where a part's spans begin."""

    def begin(self, name: str, traceparent: str, attributes: Attributes) -> Span:
        """Begins a span for a call from outside, in the caller's trace or, if it has none, in a new one."""
        return OFF

    def below(self, traceparent: str) -> Span:
        """The span of another part, to add spans below it; `OFF` if there is none."""
        return OFF

    def stop(self) -> None:
        """Sends the last spans, which takes a few seconds at most. May be called twice."""


def start(endpoint: str | None, service: str) -> Tracing:
    """Starts tracing, if it is wanted.

    Args:
        endpoint: URL of a collector that takes OTLP over gRPC; None: no traces are wanted.
        service: the name that this part's spans go by.

    Raises:
        SettingsError: the endpoint is no URL.
        StartError: the packages are missing.
    """
    if endpoint is None:
        return Tracing()
    if not endpoint.startswith(("http://", "https://")):
        raise SettingsError(f"--otlp-endpoint must be http://HOST:PORT or https://HOST:PORT, and is {endpoint!r}")
    try:
        from common.telemetry.otlp_tracing import OtlpTracing
    except ImportError as error:
        raise StartError(
            f"--otlp-endpoint needs OpenTelemetry, which is not installed ({error}): pip install 'twostroke[tracing]'"
        ) from error
    return OtlpTracing(endpoint, service)
