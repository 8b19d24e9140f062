"""Lets the event loop's many writers through a few at a time."""

import asyncio
from collections import deque

PER_TURN = 16


class Turnstile:
    """Wakes at most `PER_TURN` waiters in one turn of the event loop, in the order they came.

    A decode step wakes every stream at once. Without a limit the loop would write to all of them before it looked at
    its sockets again: workers' messages would pile up unread and be passed on token by token, however far behind the
    router is. With it, what workers send is read first, and gathers where it can be packed.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turning = False

    def admit(self, waiter: asyncio.Future[None]) -> None:
        self._waiting.append(waiter)
        if not self._turning:
            self._turning = True
            waiter.get_loop().call_soon(self._turn)

    def _turn(self) -> None:
        for _ in range(min(PER_TURN, len(self._waiting))):
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if self._waiting:
            self._waiting[0].get_loop().call_soon(self._turn)
        else:
            self._turning = False
