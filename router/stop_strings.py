"""Finds the first stop string in text that comes piece by piece, and holds back what may become one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


class StopStrings:
    """The stop string that is complete first ends the text; of two that end together, the longer one.

    All of them are followed by one Aho-Corasick automaton, so the cost of a character depends neither on their number
    nor on their length, and the result not on how the text is cut into pieces.
    """

    __slots__ = ("_automaton", "_held", "_node")

    def __init__(self, stops: Sequence[str]) -> None:
        self._automaton = _automaton(tuple(stops))
        self._node = 0
        self._held = ""

    def feed(self, text: str, may_end: bool = True) -> tuple[str, str | None]:
        """Returns the text that is certain now (without the stop string), and the stop string where one is complete.
        One that is complete before the text may end is passed over."""
        pending = self._held + text
        following, failure = self._automaton.following, self._automaton.failure
        complete = self._automaton.complete
        node = self._node
        for place, character in enumerate(text, len(self._held) + 1):
            while (longer := following[node].get(character)) is None and node:
                node = failure[node]
            node = longer or 0
            if (stop := complete[node]) is not None and may_end:
                self._held = ""
                return pending[: place - len(stop)], stop
        while node and not following[node]:  # passed over, and the beginning of no other
            node = failure[node]
        self._node = node
        certain = len(pending) - self._automaton.depth[node]
        self._held = pending[certain:]
        return pending[:certain], None

    def finish(self) -> str:
        """The text held back, now that no more comes."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True, slots=True)
class _Automaton:
    """Of each node, which is the beginning of a stop string and known by its number; 0 is the empty one."""

    following: list[dict[str, int]]  # the nodes that are longer by a character
    failure: list[int]  # the longest other node that it ends with
    depth: list[int]  # characters
    complete: list[str | None]  # the longest stop string that it ends with


@lru_cache(maxsize=1)  # the choices of a call are made one after the other
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    it = _Automaton([{}], [0], [0], [None])
    for stop in stops:
        node = 0
        for depth, character in enumerate(stop, 1):
            node = it.following[node].setdefault(character, len(it.depth))
            if node == len(it.depth):
                it.following.append({})
                it.failure.append(0)
                it.depth.append(depth)
                it.complete.append(None)
        it.complete[node] = stop
    breadth_first = list(it.following[0].values())
    for node in breadth_first:
        if it.complete[node] is None:
            it.complete[node] = it.complete[it.failure[node]]
        for character, longer in it.following[node].items():
            shorter = it.failure[node]
            while character not in it.following[shorter] and shorter:
                shorter = it.failure[shorter]
            it.failure[longer] = it.following[shorter].get(character, 0)
            breadth_first.append(longer)
    return it
