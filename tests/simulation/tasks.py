"""What the code under test gives to other threads: it is done at once, later, or when somebody waits for it."""

import random
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Tasks:
    """As much of a `ThreadPoolExecutor` as is used. Each time a task may be done, it is with this chance."""

    def __init__(self, chance: float, rng: random.Random) -> None:
        self._chance = chance
        self._rng = rng
        self._waiting: list[_Task] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        task = _Task(lambda: function(*arguments))
        self._waiting.append(task)
        self.go_on()
        return task

    def go_on(self) -> None:
        for task in self._waiting:
            if self._rng.random() < self._chance:
                task.run()
        self._waiting = [task for task in self._waiting if not task.done()]


class _Task(Future[Any]):
    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self._work = work

    def run(self) -> None:
        if self.done():
            return
        try:
            self.set_result(self._work())
        except Exception as error:
            self.set_exception(error)

    def result(self, timeout: float | None = None) -> Any:
        self.run()
        return super().result(timeout)
