import asyncio

from router.callers.turns import Turns


class Callers:
    """Each asks for a place, and keeps it until `done`."""

    def __init__(self, turns: Turns) -> None:
        self.holding: list[str] = []
        self._turns = turns
        self._done: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def ask(self, *names: str) -> None:
        """The caller is the name's first letter."""
        for name in names:
            self._done[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._hold(name))

    async def _hold(self, name: str) -> None:
        async with self._turns.place(name[0]):
            self.holding.append(name)
            try:
                await self._done[name].wait()
            finally:
                self.holding.remove(name)

    async def done(self, *names: str) -> list[str]:
        """Who holds a place then."""
        for name in names:
            self._done[name].set()
        for _ in range(20):  # turns of the event loop: each hand-over takes a few, and no time
            await asyncio.sleep(0)
        return self.holding

    def cancel(self, name: str) -> None:
        self._tasks[name].cancel()


async def test_callers_take_turns_however_much_one_wants() -> None:
    callers = Callers(Turns(places=1, each=1))
    callers.ask("a1", "a2", "a3", "b1", "b2", "c1")
    order: list[str] = []
    while holding := list(await callers.done(*order[-1:])):
        order += holding
    assert order == ["a1", "a2", "b1", "c1", "a3", "b2"]  # `a` was the first of those that wait, too


async def test_one_caller_leaves_a_place_to_others() -> None:
    callers = Callers(Turns(places=3, each=2))
    callers.ask("a1", "a2", "a3")
    assert await callers.done() == ["a1", "a2"]
    callers.ask("b1")
    assert await callers.done() == ["a1", "a2", "b1"]
    assert await callers.done("b1") == ["a1", "a2"]
    assert await callers.done("a1") == ["a2", "a3"]


async def test_who_gives_up_takes_no_place() -> None:
    callers = Callers(Turns(places=1, each=1))
    callers.ask("a1", "b1", "c1")
    assert await callers.done() == ["a1"]
    callers.cancel("b1")
    assert await callers.done("a1") == ["c1"]


async def test_who_gives_up_having_just_got_a_place_leaves_it() -> None:
    turns = Turns(places=1, each=1)
    callers = Callers(turns)
    async with turns.place("a"):
        callers.ask("b1", "c1")
        assert await callers.done() == []
    callers.cancel("b1")
    assert await callers.done() == ["c1"]
