"""Settings of a load; their docstrings are the help of the command line."""

from dataclasses import dataclass

from benchmarks.load.lengths import parse_lengths


@dataclass(frozen=True, slots=True)
class LoadConfig:
    concurrency: int | None = None
    """Closed loop: this many requests are always under way. 8 if there is no --rate either."""

    rate: float | None = None
    """Open loop: Poisson arrivals, this many requests a second, however many are under way."""

    requests: int | None = None
    """Ends after this many requests. 100 if there is no --duration either."""

    duration: float | None = None
    """Sends no new requests after this many seconds; those under way still finish."""

    warmup: int = 8
    """Requests that are sent first and not measured."""

    prompt_tokens: str = "256"
    """Tokens of a prompt, without its shared prefix: N, uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA. If prompt and
    answer together are longer than the cluster takes, they are cut, the answer first."""

    output_tokens: str = "64"
    """Tokens of an answer, in the same form. The model's own end of the answer is ignored."""

    prefix_tokens: int = 0
    """Tokens of the prefix that prompts share."""

    prefixes: int = 1
    """Number of different shared prefixes; each prompt draws one of them."""

    temperature: float = 0.0
    """0 is greedy."""

    seed: int = 0
    """The same seed makes the same requests at the same times."""

    share_call: bool = False
    """All requests share one gRPC call, as those of AsyncClient(share_call=True) do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep to count as goodput, in milliseconds."""

    ttft_limit: float | None = None
    """Goodput counts requests whose first token came within this many milliseconds."""

    tpot_limit: float | None = None
    """Goodput counts requests with at most this many milliseconds per token after the first."""


def check(config: LoadConfig) -> None:
    """
    Raises:
        ValueError: settings contradict each other or make no sense; the sentence says how.
    """
    if config.concurrency is not None and config.rate is not None:
        raise ValueError("give --concurrency (closed loop) or --rate (open loop), not both")
    for name, least in (("concurrency", 1), ("requests", 1), ("prefixes", 1), ("warmup", 0), ("prefix_tokens", 0)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    for name in ("rate", "duration"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} must be above 0, not {value}")
    for lengths in (config.prompt_tokens, config.output_tokens):
        parse_lengths(lengths)
