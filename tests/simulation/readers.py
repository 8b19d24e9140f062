"""A caller that reads the answers of one router over a shared call, and when it likes."""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import cast
from unittest import mock

import numpy as np

from router.dispatch import settled
from router.dispatch.request import Request
from router.dispatch.settled import Settled, Stream
from router.metrics import Metrics
from router.vocabulary.words import Words
from tests.router.models import EOS, VOCAB_SIZE


@contextmanager
def settling_early() -> Iterator[None]:
    """The batches here are small."""
    with mock.patch.object(settled, "LEAST_BATCH", 1):
        yield


class SharedCall:
    """
    Attributes:
        told: tokens that the caller was given, by the serials of requests.
    """

    def __init__(self) -> None:
        self.told: defaultdict[int, list[int]] = defaultdict(list)
        self.settled = 0
        self._rng = random.Random(0)  # of its own: what it reads when changes nothing for the others
        self._streams = Settled(_every_seventh_token_is_none(), Metrics().inter_token)
        self._open = ExitStack()
        self._reader = self._open.enter_context(self._streams.reading(lambda: None))

    def read(self, requests: Iterable[Request]) -> None:
        if self._rng.random() < 0.3:
            return
        for rows in self._streams.to_take(self._reader, 3):
            if (deltas := self._streams.take(self._reader, rows)) is not None:
                for serial, token in zip(deltas.numbers, deltas.token_ids, strict=True):
                    self.told[serial].append(token)
        ready = [request for request in requests if request.posted and self._read(request)]
        self.settled += self._streams.settle(
            self._reader, [Stream(request, request.serial, wants_token_ids=True) for request in ready]
        )

    @property
    def has_settled(self) -> bool:
        """Some of its streams still are."""
        return any(self._streams._requests) or bool(self._reader.settled)

    def _read(self, request: Request) -> bool:
        """Whether it can be settled then."""
        request.posted = False
        new = request.output[request.taken :]
        self.told[request.serial] += new
        request.taken, request.told_at = len(request.output), 0.0
        return len(new) == 1 and not request.wants_logprobs and self._streams.may_settle(request)


def _every_seventh_token_is_none() -> Words:
    others = {EOS, *range(0, VOCAB_SIZE, 7)}
    words = np.array([token not in others for token in range(VOCAB_SIZE)])
    return cast(Words, SimpleNamespace(texts=[""] * VOCAB_SIZE, words=words, others=frozenset(others)))
