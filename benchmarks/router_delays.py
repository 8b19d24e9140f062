"""For how long a router has each token, told by tokens that are the time at which they were made."""

import math
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, Self, TypeAlias

from common.model.model_config import load_config
from common.model.model_error import ModelError
from router.cluster.worker import Worker
from router.prompts.tokenizer import Tokenizer
from router.server import Router
from router.vocabulary.words import Words
from twostroke.v1 import inference_pb2, worker_pb2

TICKS, TICKS_PER_SECOND = 40_000, 10_000

Written: TypeAlias = tuple[float, float, Any]  # when gRPC was given a message, when it accepted it, and the message
Read: TypeAlias = tuple[float, set[int]]  # when a worker's message had been read, and its tokens


@dataclass(frozen=True)
class TokenClock:
    """
    Attributes:
        tokens: one for each tick. They are whole characters, as nearly all tokens of a text are: those of one step are
            the same for all streams here, which else would have a part of a character at once.
    """

    tokens: tuple[int, ...]

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Of a model's tokens."""
        model = load_config(directory)
        words = Words(Tokenizer(directory, model).token_bytes, model.eos_token_ids).words.nonzero()[0]
        if len(words) < TICKS:
            raise ModelError(f"the vocabulary has {len(words)} tokens that are whole characters; {TICKS} are needed")
        return cls(tuple(words[:TICKS].tolist()))

    def token(self, seconds: float) -> int:
        """Of a time, as `time.monotonic` tells it."""
        return self.tokens[int(seconds * TICKS_PER_SECOND) % TICKS]

    def now(self, _length: int = 0) -> int:
        return self.token(time.monotonic())

    def age_ms(self, token: int, seconds: float) -> float:
        """Its age at a time."""
        return 1000 * ((int(seconds * TICKS_PER_SECOND) - self._ticks[token]) % TICKS) / TICKS_PER_SECOND

    @cached_property
    def _ticks(self) -> dict[int, int]:
        return {token: tick for tick, token in enumerate(self.tokens)}


class RouterDelays:
    """Notes when a router reads a worker's message, and when gRPC accepts a client's. What is done with that waits for
    the end: it would take as long as the router itself."""

    def __init__(self, router: Router, clock: TokenClock) -> None:
        self._clock = clock
        self._written: list[Written] = []
        self._read: list[Read] = []
        service, registry = router.service, router.registry
        for part, method, noting in (
            (registry, "received", self._noting_reads),
            (service, "GenerateStream", self._noting_writes),
            (service, "GenerateMany", self._noting_writes),
        ):
            setattr(part, method, noting(getattr(part, method)))

    def _noting_reads(self, received: Any) -> Any:
        def noted(worker: Worker, message: worker_pb2.WorkerMessage) -> None:
            if message.tokens.token_ids:
                self._read.append((time.monotonic(), set(message.tokens.token_ids)))
            received(worker, message)

        return noted

    def _noting_writes(self, method: Any) -> Any:
        async def noted(request: Any, context: Any) -> None:
            await method(request, _Context(context, self._written))

        return noted

    def ages(self) -> tuple["array[float]", "array[float]"]:
        """Of each token, in ms: for how long the router had it, and its age when gRPC accepted its message. Where
        workers made tokens in the same tenth of a millisecond, the first that was read counts for all."""
        in_hand, ages = array("d"), array("d")
        read_at: dict[int, float] = {}
        reads = iter(self._read)
        following = next(reads, None)
        for given, accepted, message in sorted(self._written, key=itemgetter(0)):
            while following is not None and following[0] <= given:
                at, tokens = following
                for token in tokens:
                    if at - read_at.get(token, -math.inf) > TICKS / TICKS_PER_SECOND / 2:  # else it is the same tick
                        read_at[token] = at
                following = next(reads, None)
            for token in _tokens(message):
                ages.append(self._clock.age_ms(token, accepted))
                if token in read_at:  # the prefill worker's are not
                    in_hand.append(1000 * (given - read_at[token]))
        return in_hand, ages


class _Context:
    """A call's, that notes when gRPC is given each message, and when it has accepted it."""

    def __init__(self, context: Any, written: list[Written]) -> None:
        self.abort = context.abort
        self.invocation_metadata = context.invocation_metadata
        self.peer = context.peer
        self.time_remaining = context.time_remaining
        self._write = context.write
        self._written = written

    async def write(self, message: Any) -> None:
        given = time.monotonic()
        await self._write(message)
        self._written.append((given, time.monotonic(), message))


def _tokens(message: Any) -> Iterator[int]:
    if not isinstance(message, inference_pb2.GenerateManyResponse):
        yield from message.delta.token_ids
        return
    yield from message.deltas.token_ids
    for event in message.events:
        yield from event.chunk.delta.token_ids
