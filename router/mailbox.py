"""A queue of things that have news, from many producers to the one consumer that writes an answer."""

import asyncio
from typing import Generic, TypeVar

from router.turnstile import Turnstile

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Everything that gathers while the consumer is busy, or waits for its turn, is taken at once. So a slow client
    gets fewer and larger messages, and all clients do while the router is overloaded.

    Args:
        turnstile: where consumers take turns.
        reader: the consumer's task, which `overflow` cancels.
    """

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
        """Too much has gathered: cancels the consumer, which is probably blocked by a client that does not read."""
        if not self.overflown and self._reader is not None:
            self.overflown = True
            self._reader.cancel()

    async def take(self) -> list[T]:
        """Waits until something is posted and it is the consumer's turn; returns all that was posted since the last
        call."""
        waiter = asyncio.get_running_loop().create_future()
        if self._posted:
            self._turnstile.admit(waiter)
        else:
            self._waiter = waiter
        await waiter
        posted, self._posted = self._posted, []
        return posted

    def clear(self) -> None:
        """For the consumer that leaves: what is posted may hold this mailbox, too."""
        self._posted.clear()
