"""Messages on their way from a worker to one router."""

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import islice

import structlog

from common.worker import joined
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
        if not self._messages:
            return None
        count = joined.most_that_join([message for message, _ in islice(self._messages, MOST_JOINED)])
        return joined.join([self._pop() for _ in range(count)])

    def _pop(self) -> pb.WorkerMessage:
        message, size = self._messages.popleft()
        self._bytes -= size
        return message
