"""Streamed text, for a parser that takes it from the front."""

import re
from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")

# A parser is a generator that yields when it needs more text to go on, and is resumed when there is more.
Steps: TypeAlias = Generator[None, None, T]


class Incoming:
    """The text that was received and not yet taken: `text` from `place` on. `over`: nothing comes after it.

    Looks at each character a few times at most, however the text is cut into pieces.
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
        """Takes the text up to a mark, and the mark. If it was not found, takes what can't be the beginning of one.

        Returns:
            The text without the mark, and whether the mark was found.
        """
        found = self.text.find(mark, self.place)
        if found < 0:
            return self.take_to(len(self.text) - (0 if self.over else self._begun(mark))), False
        before = self.take_to(found)
        self.place += len(mark)
        return before, True

    def _begun(self, mark: str) -> int:
        """How many characters at the text's end may be the beginning of a mark."""
        for length in range(len(mark) - 1, 0, -1):
            if self.text.endswith(mark[:length], self.place):
                return length
        return 0

    def takes(self, mark: str, *, or_end: bool = False) -> Steps[bool]:
        """Takes a mark if it comes next, and returns whether it did. `or_end`: the end of the text counts as the mark,
        also in the middle of it."""
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
        """Takes the characters that match, `most` of them at most. The pattern must match a run of characters of one
        class, which may be empty or cut anywhere."""
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
