"""Finds the first stop string in streamed text, and holds back what may become one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


class StopStrings:
    """The stop string that ends first counts; of two that end with the same character, the longer one.

    One Aho-Corasick automaton matches all of them, so the cost per character depends neither on their number nor on
    their length. Nor does the result depend on how the text is cut into pieces.
    """

    __slots__ = ("_automaton", "_held", "_node")

    def __init__(self, stops: Sequence[str]) -> None:
        self._automaton = _automaton(tuple(stops))
        self._node = 0
        self._held = ""

    def feed(self, text: str, may_end: bool = True) -> tuple[str, str | None]:
        """Returns the text that is certain now, without the stop string, and the stop string if one is complete. One
        that is complete while `may_end` is false is passed over."""
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
        while node and not following[node]:  # a stop string that was passed over
            node = failure[node]
        self._node = node
        certain = len(pending) - self._automaton.depth[node]
        self._held = pending[certain:]
        return pending[:certain], None

    def finish(self) -> str:
        """Returns the text that was held back, since nothing follows it."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True, slots=True)
class _Automaton:
    """An Aho-Corasick automaton. A node is a prefix of a stop string; the lists are indexed by node, 0 is the empty
    one."""

    following: list[dict[str, int]]  # by character: the node that is longer by it
    failure: list[int]  # the longest shorter node that is a suffix of this one
    depth: list[int]  # length in characters
    complete: list[str | None]  # the longest stop string that is a suffix of this node


@lru_cache(maxsize=1)  # for the choices of one call, which are made one after the other
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
