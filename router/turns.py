"""A few places at which callers take turns."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Of the callers that wait, the one whose last turn is longest ago is next, however much the others want.

    Args:
        places: that can be held at once.
        each: places that one caller can hold at once.
    """

    def __init__(self, places: int, each: int) -> None:
        self._free = places
        self._each = each
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of the callers' turns

    @asynccontextmanager
    async def place(self, caller: str) -> AsyncIterator[None]:
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
                self._waiting[caller] = turns  # behind all others
            if not turn.cancelled():
                self._free -= 1
                self._held[caller] += 1
                turn.set_result(None)

    def _next(self) -> str | None:
        return next((caller for caller in self._waiting if self._held[caller] < self._each), None)
