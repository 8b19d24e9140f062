"""Where the producers of an answer leave word that there is something to take, for one consumer."""

import asyncio
from typing import Generic, TypeVar

from router.turnstile import Turnstile

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Whatever gathers while the consumer is busy, or waits for its turn, is taken at once: that is what packs the
    messages of a slow client, and of all clients where the router is the slow one."""

    __slots__ = ("_posted", "_reader", "_turnstile", "_waiter", "overflown")

    def __init__(self, turnstile: Turnstile, reader: asyncio.Task[object] | None = None) -> None:
        self._turnstile = turnstile
        self._reader = reader
        self.overflown = False
        self._posted: list[T] = []
        self._waiter: asyncio.Future[None] | None = None

    def post(self, item: T) -> None:
        self._posted.append(item)
        if self._waiter is not None:
            self._turnstile.admit(self._waiter)
            self._waiter = None

    def overflow(self) -> None:
        """More has gathered than may: cancels the consumer, who may be waiting for a client that does not read."""
        if not self.overflown and self._reader is not None:
            self.overflown = True
            self._reader.cancel()

    async def take(self) -> list[T]:
        """Everything posted since the last call; waits while there is nothing, and for its turn."""
        waiter = asyncio.get_running_loop().create_future()
        if self._posted:
            self._turnstile.admit(waiter)
        else:
            self._waiter = waiter
        await waiter
        posted, self._posted = self._posted, []
        return posted
