"""Finds the first stop string in text that comes piece by piece, and holds back what may become one."""

from collections.abc import Sequence


class StopStrings:
    """The stop string that is complete first ends the text; of two that end together, the longer one.

    Every stop string is followed by its Knuth-Morris-Pratt automaton, so the cost of a character does not depend on the
    strings' length, and the result not on how the text is cut into pieces.
    """

    __slots__ = ("_failures", "_held", "_states", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""

    def feed(self, text: str, may_end: bool = True) -> tuple[str, str | None]:
        """Returns the text that is certain now (without the stop string), and the stop string where one is complete.
        One that is complete before the text may end is passed over."""
        pending = self._held + text
        states = self._states
        for place, character in enumerate(text, len(self._held) + 1):
            for number, stop in enumerate(self._stops):
                state = states[number]
                failure = self._failures[number]
                while state and stop[state] != character:
                    state = failure[state - 1]
                if stop[state] == character:
                    state += 1
                if state == len(stop) and not may_end:
                    state = failure[-1]
                elif state == len(stop):
                    self._held = ""
                    return pending[: place - len(stop)], stop
                states[number] = state
        certain = len(pending) - max(states, default=0)
        self._held = pending[certain:]
        return pending[:certain], None

    def finish(self) -> str:
        """The text held back, now that no more comes."""
        held, self._held = self._held, ""
        return held


def _failure_table(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    length = 0
    for place in range(1, len(stop)):
        while length and stop[place] != stop[length]:
            length = table[length - 1]
        if stop[place] == stop[length]:
            length += 1
        table[place] = length
    return table
