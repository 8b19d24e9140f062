"""Messages that wait to be sent to a worker."""

import asyncio
from collections import deque

from common.worker.message_size import FULL_BYTES
from twostroke.v1 import worker_pb2


class Outbox:
    """Packs all that waits into as few messages as keep to the limit of `message_size.most_bytes`."""

    def __init__(self) -> None:
        self._messages: deque[worker_pb2.RouterMessage] = deque()
        self._bytes = 0  # in the last of them, as far as they were counted
        self._has_messages = asyncio.Event()

    def last(self, more: int = 0) -> worker_pb2.RouterMessage:
        """The message that the next thing goes into.

        Args:
            more: bytes of it, if it may be large.
        """
        if not self._messages or self._bytes + more > FULL_BYTES:
            self._messages.append(worker_pb2.RouterMessage())
            self._bytes = 0
            self._has_messages.set()
        self._bytes += more
        return self._messages[-1]

    async def next_message(self) -> worker_pb2.RouterMessage:
        await self._has_messages.wait()
        message = self._messages.popleft()
        if not self._messages:
            self._has_messages.clear()
        return message


def most_bytes_of(sequence: worker_pb2.Sequence) -> int:
    """No less than it has. To count them exactly takes as long as sending them: milliseconds for a long prompt."""
    tokens, biases = len(sequence.token_ids), len(sequence.sampling.logit_bias)
    return 5 * tokens + len(sequence.block_hashes) + 4 * len(sequence.grammar) + 16 * biases + 2048
