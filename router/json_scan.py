"""Where a JSON object ends that comes piece by piece, without reading any of it twice."""

import re

from router import json_object

# Between brackets and strings; a literal that is none of JSON is for the parser to find.
_OUTSIDE = re.compile(r"[-+.,:0-9A-Za-z \t\r\n]*")
_INSIDE = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]*')
_ESCAPED = re.compile(r"[^\ud800-\udfff]?")
_CLOSER = {"{": "}", "[": "]"}


class JsonScan:
    """Follows brackets and strings. What it takes for complete may still be no JSON; what it gives up is none, or is
    larger or deeper than `json_object.parse` takes."""

    __slots__ = ("_closers", "_escaped", "_in_string", "_left", "complete", "over")

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._in_string = False
        self._escaped = False
        self._left = json_object.MAX_BYTES
        self.over = False
        self.complete = False

    def feed(self, text: str, begin: int) -> int:
        """Goes on with what comes at `begin`. Returns the place up to which that may be of the object: that of its end
        where it is `complete` then, and that of what cannot be of it where it is `over` without that."""
        place, end = begin, min(len(text), begin + self._left)
        while place < end and not self.over:
            place = self._string(text, place, end) if self._in_string else self._structure(text, place, end)
        self._left -= place - begin
        self.over = self.over or not self._left
        return place

    def _string(self, text: str, place: int, end: int) -> int:
        if self._escaped:  # by a backslash: whether it may be, the parser knows
            self._escaped = False
            self.over = _run(_ESCAPED, text, place, end) == place
            return place if self.over else place + 1
        place = _run(_INSIDE, text, place, end)
        if place < end:
            if text[place] == '"':
                self._in_string = False
            elif text[place] == "\\":
                self._escaped = True
            else:
                self.over = True
                return place
            return place + 1
        return place

    def _structure(self, text: str, place: int, end: int) -> int:
        closers = self._closers
        if closers:
            place = _run(_OUTSIDE, text, place, end)
            if place == end:
                return place
        character = text[place]
        if character in _CLOSER if closers else character == "{":
            self.over = len(closers) == json_object.MAX_DEPTH
            closers.append(_CLOSER[character])
        elif closers and character == '"':
            self._in_string = True
        elif closers and character == closers[-1]:
            closers.pop()
            self.over = self.complete = not closers
        else:
            self.over = True
        return place if self.over and not self.complete else place + 1


def _run(pattern: "re.Pattern[str]", text: str, place: int, end: int) -> int:
    """The end of what matches at `place`, which may be nothing."""
    match = pattern.match(text, place, end)
    return place if match is None else match.end()
