"""Round-robin scheduling of callers over a few places."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Places go to the waiting callers in turn, however many each of them asks for.

    Args:
        places: how many can be held at once.
        each: how many of them one caller can hold at once.
    """

    def __init__(self, places: int, each: int) -> None:
        self._free = places
        self._each = each
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by caller, the next one first

    @asynccontextmanager
    async def place(self, caller: str) -> AsyncIterator[None]:
        """Waits for a place, and holds it for the duration of the block."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        self._admit()
        try:
            await turn
            yield
        finally:
            if not turn.cancelled():
                self._free += 1
                self._held[caller] -= 1
                self._admit()

    def _admit(self) -> None:
        while self._free and (caller := self._next()) is not None:
            turns = self._waiting.pop(caller)
            turn = turns.popleft()
            if turns:
                self._waiting[caller] = turns  # now behind all others
            if not turn.cancelled():
                self._free -= 1
                self._held[caller] += 1
                turn.set_result(None)

    def _next(self) -> str | None:
        return next((caller for caller in self._waiting if self._held[caller] < self._each), None)
