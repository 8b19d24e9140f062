"""A thread pool that callers share fairly."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from router.callers.turns import Turns

T = TypeVar("T")


class FairThreads:
    """Callers take turns, and none can occupy all threads: however much slow work one of them submits, a thread is left
    for the others. Needs at least two threads."""

    def __init__(self, count: int, name: str) -> None:
        self._turns = Turns(count, count - 1)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix=name)

    def submit(self, caller: str, work: Callable[[], T]) -> asyncio.Task[T]:
        """Runs `work` on a thread when it is the caller's turn. What a thread has begun can't be cancelled, so the task
        that is returned should be awaited with `asyncio.shield`."""
        return asyncio.create_task(self._in_turn(caller, work))

    async def _in_turn(self, caller: str, work: Callable[[], T]) -> T:
        async with self._turns.place(caller):
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
