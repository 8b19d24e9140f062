"""What one API key may use: its limits, and how much of them is used up."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import grpc

from router.errors import CallError, InvalidArgument


@dataclass(frozen=True, slots=True)
class Limits:
    """None is no limit."""

    requests_per_minute: int | None = None  # calls of any method
    concurrent_requests: int | None = None  # choices that are generated at once
    tokens_per_minute: int | None = None  # of prompts and answers


class Meter:
    """A leaky bucket: what is counted drains at the limit's rate, so an idle caller has a minute's worth at once."""

    def __init__(self) -> None:
        self._used = 0.0
        self._at = time.monotonic()

    def used(self, per_minute: int) -> float:
        """What of the limit is used up now. It may be more than all of it: what is used is known only afterwards."""
        now = time.monotonic()
        self._used = max(0.0, self._used - (now - self._at) * per_minute / 60)
        self._at = now
        return self._used

    def add(self, amount: int) -> None:
        self._used += amount


@dataclass(slots=True)
class Usage:
    """Outlives the reading of a changed keys file."""

    calls: Meter = field(default_factory=Meter)
    tokens: Meter = field(default_factory=Meter)
    running: int = 0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call."""

    name: str
    cache_group: str | None = None  # None: prefixes are shared with everyone
    limits: Limits = Limits()
    usage: Usage = field(default_factory=Usage)

    def call(self) -> None:
        """Counts a call.

        Raises:
            CallError: RESOURCE_EXHAUSTED, with the limit.
        """
        limit = self.limits.requests_per_minute
        if limit is None:
            return
        over = self.usage.calls.used(limit) + 1 - limit
        if over > 0:
            raise _exhausted(f"{self.name!r} may make {limit} requests per minute", 60 * over / limit)
        self.usage.calls.add(1)

    @contextmanager
    def generating(self, choices: int) -> Iterator[None]:
        """As long as so many choices are generated.

        Raises:
            CallError: RESOURCE_EXHAUSTED, with the limit; INVALID_ARGUMENT where they are more than it ever allows.
        """
        most, tokens, usage = self.limits.concurrent_requests, self.limits.tokens_per_minute, self.usage
        if most is not None and choices > most:
            sentence = f"{choices} answers are more than the {most} that {self.name!r} may have at once"
            raise InvalidArgument("n", sentence)
        if most is not None and usage.running + choices > most:
            sentence = f"{self.name!r} may have {most} concurrent requests, and has {usage.running}"
            raise _exhausted(f"{sentence}; this one counts as {choices}" if choices > 1 else sentence)
        if tokens is not None and (over := usage.tokens.used(tokens) - tokens) >= 0:
            raise _exhausted(f"{self.name!r} may use {tokens} tokens per minute", 60 * (over + 1) / tokens)
        usage.running += choices
        try:
            yield
        finally:
            usage.running -= choices

    def spend(self, tokens: int) -> None:
        if self.limits.tokens_per_minute is not None:
            self.usage.tokens.used(self.limits.tokens_per_minute)  # what has drained until now must not be this
            self.usage.tokens.add(tokens)

    def cache_salt(self, salt: str) -> str:
        """The salt of a request's cached prefixes, different for every pair of cache group and salt of the request."""
        return salt if self.cache_group is None else f"{self.cache_group}\0{salt}"


# Whoever makes the call that the current task serves; everyone, where there are no API keys.
EVERYONE = Caller("everyone")
CALLER: ContextVar[Caller] = ContextVar("caller", default=EVERYONE)


def _exhausted(sentence: str, seconds: float | None = None) -> CallError:
    when = "later" if seconds is None else f"in {seconds:.1f} s"
    return CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{sentence}; try again {when}")
