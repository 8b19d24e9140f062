"""Text that comes piece by piece, to a reader that takes it from the front."""

import re
from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")

# A reader is a generator: it yields where what has come does not tell how to go on, and is resumed when there is more.
Steps: TypeAlias = Generator[None, None, T]


class Incoming:
    """Looks at no character more than a few times, however the text is cut.

    `text` from `place` on has come and was not yet taken; `over`: nothing more comes.
    """

    __slots__ = ("over", "place", "text")

    def __init__(self) -> None:
        self.text = ""
        self.place = 0
        self.over = False

    def add(self, text: str, *, last: bool) -> None:
        self.text = self.text[self.place :] + text
        self.place = 0
        self.over = last

    def take_to(self, place: int) -> str:
        begin, self.place = self.place, place
        return self.text[begin:place]

    def take_before(self, mark: str) -> tuple[str, bool]:
        """All that certainly comes before a mark; and whether that was found, and taken, too."""
        found = self.text.find(mark, self.place)
        if found < 0:
            return self.take_to(len(self.text) - (0 if self.over else self._begun(mark))), False
        before = self.take_to(found)
        self.place += len(mark)
        return before, True

    def _begun(self, mark: str) -> int:
        """How much of a mark's beginning the text ends with."""
        for length in range(len(mark) - 1, 0, -1):
            if self.text.endswith(mark[:length], self.place):
                return length
        return 0

    def takes(self, mark: str, *, or_end: bool = False) -> Steps[bool]:
        """Whether a mark is next, and takes it; `or_end`: the end of the text, or as much of the mark as came before
        that, will do."""
        while True:
            there = self.text[self.place : self.place + len(mark)]
            begun = mark.startswith(there)
            if there == mark or (begun and self.over and or_end):
                self.place += len(there)
                return True
            if self.over or not begun:
                return False
            yield

    def run(self, pattern: "re.Pattern[str]", most: int | None = None) -> Steps[str]:
        """The characters that match; a `pattern` is of one character, as often as there are any."""
        pieces: list[str] = []
        left = most
        while True:
            end = len(self.text) if left is None else min(len(self.text), self.place + left)
            match = pattern.match(self.text, self.place, end)
            piece = self.take_to(self.place if match is None else match.end())
            pieces.append(piece)
            left = None if left is None else left - len(piece)
            if self.over or left == 0 or self.place < len(self.text):
                return "".join(pieces)
            yield
