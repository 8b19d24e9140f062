"""Threads at which callers take turns."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from router.turns import Turns

T = TypeVar("T")


class FairThreads:
    """One caller gets all but one of them at most: what takes long holds up neither the caller's next piece of work
    nor, however much of that there is, anybody else's."""

    def __init__(self, count: int, name: str) -> None:
        self._turns = Turns(count, count - 1)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix=name)

    def submit(self, caller: str, work: Callable[[], T]) -> asyncio.Task[T]:
        """A thread that began something comes to its end, so whoever waits for that should shield it."""
        return asyncio.create_task(self._in_turn(caller, work))

    async def _in_turn(self, caller: str, work: Callable[[], T]) -> T:
        async with self._turns.place(caller):
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
