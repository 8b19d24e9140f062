"""Messages on their way from a worker to one router."""

import asyncio
from collections import deque
from collections.abc import Callable

import structlog

from common.kv import cache_changes
from twostroke.v1 import worker_pb2 as pb

log = structlog.get_logger(__name__)

# A router that leaves this many messages or bytes unread is cut off: its attempts end, so memory stays bounded.
# Measuring a message takes as long as sending it, so the first ones, which nearly all routers keep up with, are not
# measured.
MAX_UNSENT_MESSAGES = 10_000
MAX_UNSENT_BYTES = 64 << 20
UNMEASURED_MESSAGES = 100
MOST_JOINED = 64  # messages


class Unsent:
    """A queue of messages; `ready` is set whenever there is something to take.

    Args:
        cut_off: called once, when too much is unread. What is unread is forgotten then, and so is all that follows.
    """

    def __init__(self, cut_off: Callable[[], object]) -> None:
        self.ready = asyncio.Event()
        self.is_cut_off = False
        self._messages: deque[tuple[pb.WorkerMessage, int]] = deque()  # with the bytes of those that were measured
        self._bytes = 0
        self._cut_off = cut_off

    def put(self, message: pb.WorkerMessage) -> None:
        if self.is_cut_off:
            return
        count = len(self._messages)
        size = message.ByteSize() if count >= UNMEASURED_MESSAGES else 0
        if count >= MAX_UNSENT_MESSAGES or self._bytes + size > MAX_UNSENT_BYTES:
            log.error("a router does not read; cutting it off", unsent=count, mebibytes=self._bytes >> 20)
            self.is_cut_off = True
            self._messages.clear()
            self._cut_off()
            return
        self._messages.append((message, size))
        self._bytes += size
        self.ready.set()

    def take(self) -> pb.WorkerMessage | None:
        """What to send next; None if there is nothing. Messages that gathered while the one before was sent are joined:
        a router that is behind gets fewer and larger ones, and can catch up."""
        message = self._pop()
        if message is None:
            return None
        for _ in range(MOST_JOINED - 1):
            if not self._messages or not _can_be_joined(message, self._messages[0][0]):
                break
            later = self._pop()
            assert later is not None
            _join(message, later)
        return message

    def _pop(self) -> pb.WorkerMessage | None:
        if not self._messages:
            return None
        message, size = self._messages.popleft()
        self._bytes -= size
        return message


def _can_be_joined(message: pb.WorkerMessage, later: pb.WorkerMessage) -> bool:
    """A load counts in everything else in its message, and a snapshot of the cache takes the place of what was known
    before."""
    outdated_load = message.HasField("load") and not later.HasField("load")
    return not (outdated_load or message.cache.snapshot or later.cache.snapshot)


def _join(message: pb.WorkerMessage, later: pb.WorkerMessage) -> None:
    """Adds what came later to a message. The router takes in an attempt's events in the order in which they happen,
    whatever their order in the message."""
    if message.HasField("tokens") and later.HasField("tokens"):
        _fill_logprobs(message.tokens, later.tokens)
    if message.HasField("cache") and later.HasField("cache"):
        later.cache.CopyFrom(cache_changes.join(message.cache, later.cache))
        message.ClearField("cache")
    message.ClearField("load")
    message.MergeFrom(later)


def _fill_logprobs(*steps: pb.StepTokens) -> None:
    """Log-probabilities are given for all tokens of a message, or for none."""
    if any(step.logprobs for step in steps):
        for step in steps:
            step.logprobs.extend(pb.Logprobs() for _ in range(len(step.token_ids) - len(step.logprobs)))
