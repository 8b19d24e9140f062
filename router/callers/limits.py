"""Limits of an API key, and how much of them is used up."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from router.errors import Exhausted, InvalidArgument


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one API key. None: there is none."""

    requests_per_minute: int | None = None  # calls of any method
    concurrent_requests: int | None = None  # choices, counted while their call is under way
    tokens_per_minute: int | None = None  # of prompts and answers


class Meter:
    """A leaky bucket. What is counted drains at the limit's rate, so a caller that was idle can use a minute's worth at
    once."""

    def __init__(self) -> None:
        self._used = 0.0
        self._at = time.monotonic()

    def used(self, per_minute: int) -> float:
        """How much of the limit is used up now; it may be more than the limit, since tokens are counted afterwards."""
        now = time.monotonic()
        self._used = max(0.0, self._used - (now - self._at) * per_minute / 60)
        self._at = now
        return self._used

    def add(self, amount: int) -> None:
        self._used += amount


@dataclass(slots=True)
class Usage:
    """What a key has used. It is kept when the keys file is read again."""

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
        """Counts one call, of any method.

        Raises:
            Exhausted: with the limit and when to try again.
        """
        limit = self.limits.requests_per_minute
        if limit is None:
            return
        over = self.usage.calls.used(limit) + 1 - limit
        if over > 0:
            raise Exhausted(f"{self.name!r} may make {limit} requests per minute", 60 * over / limit)
        self.usage.calls.add(1)

    @contextmanager
    def generating(self, choices: int) -> Iterator[None]:
        """Counts so many choices as running for the duration of the block.

        Raises:
            Exhausted: with the limit.
            InvalidArgument: they are more than it ever allows.
        """
        most, tokens, usage = self.limits.concurrent_requests, self.limits.tokens_per_minute, self.usage
        if most is not None and choices > most:
            sentence = f"{choices} answers are more than the {most} that {self.name!r} may have at once"
            raise InvalidArgument("n", sentence)
        if most is not None and usage.running + choices > most:
            sentence = f"{self.name!r} may have {most} concurrent requests, and has {usage.running}"
            raise Exhausted(f"{sentence}; this one counts as {choices}" if choices > 1 else sentence)
        if tokens is not None and (over := usage.tokens.used(tokens) - tokens) >= 0:
            raise Exhausted(f"{self.name!r} may use {tokens} tokens per minute", 60 * (over + 1) / tokens)
        usage.running += choices
        try:
            yield
        finally:
            usage.running -= choices

    def spend(self, tokens: int) -> None:
        """Counts tokens of a prompt or an answer."""
        if self.limits.tokens_per_minute is not None:
            self.usage.tokens.used(self.limits.tokens_per_minute)  # drains what was there before
            self.usage.tokens.add(tokens)

    def cache_salt(self, salt: str) -> str:
        """The salt of the hashes of a request's blocks. It differs between cache groups, and within one between
        salts."""
        return salt if self.cache_group is None else f"{self.cache_group}\0{salt}"


# Who made the call that the current task serves. Without API keys that is always EVERYONE.
EVERYONE = Caller("everyone")
CALLER: ContextVar[Caller] = ContextVar("caller", default=EVERYONE)

# Finds out again who makes that call, and counts one more, by the name that is given: for calls that stay open and have
# further requests. Where the key is no longer valid, or a limit is reached, it counts a refused call and raises
# CallError.
CALL_AGAIN: ContextVar[Callable[[str], Caller]] = ContextVar("call_again", default=lambda _: EVERYONE)
