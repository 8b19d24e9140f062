"""Lets a few of many writers go on in each turn of the event loop."""

import asyncio
from collections import deque

# The more, the less a message costs a router that keeps up. But saturated, 16 and more gave fewer tokens/s and several
# times the delay (`benchmarks.router`).
PER_TURN = 4


class Turnstile:
    """Wakes the first `PER_TURN` waiters per turn of the event loop, first come first served.

    A decode step has news for every stream at once. If all of them were written before the loop polls its sockets
    again, the workers' next messages would pile up unread, and an overloaded router would still send one token per
    message. This way sockets are read in between, and tokens gather in the mailboxes, where they can be packed.
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
            if not waiter.done():  # else its consumer was cancelled
                waiter.set_result(None)
        if self._waiting:
            self._waiting[0].get_loop().call_soon(self._turn)
        else:
            self._turning = False
