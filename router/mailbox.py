"""Where the producers of an answer leave word that there is something to take, for one consumer."""

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Whatever gathers while the consumer is busy is taken at once: that is what packs a slow client's messages."""

    __slots__ = ("_posted", "_waiter")

    def __init__(self) -> None:
        self._posted: list[T] = []
        self._waiter: asyncio.Future[None] | None = None

    def post(self, item: T) -> None:
        self._posted.append(item)
        if self._waiter is not None:
            self._waiter.set_result(None)
            self._waiter = None

    async def take(self) -> list[T]:
        """Everything posted since the last call; waits while there is nothing."""
        if not self._posted:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        posted, self._posted = self._posted, []
        return posted
