"""What the code under test gives to other threads: here it is done when the world says so, or once somebody waits."""

import random
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


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


class Tasks:
    """As much of a `ThreadPoolExecutor` as is used."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._waiting: list[_Task] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self._waiting.append(task := _Task(lambda: function(*arguments)))
        return task

    def go_on(self) -> None:
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            if self._rng.random() < 0.5:
                task.run()
            else:
                self._waiting.append(task)


class AtOnce(Tasks):
    """Leaves nothing for later."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        task = _Task(lambda: function(*arguments))
        task.run()
        return task
