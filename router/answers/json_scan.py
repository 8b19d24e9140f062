"""Finds the end of a JSON object that is streamed, without reading any of it twice."""

import re

from router import json_object

# Between brackets and strings. Whether these are literals of JSON is left to the parser.
_OUTSIDE = re.compile(r"[-+.,:0-9A-Za-z \t\r\n]*")
_INSIDE = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]*')
_ESCAPED = re.compile(r"[^\ud800-\udfff]?")
_CLOSER = {"{": "}", "[": "]"}


class JsonScan:
    """Follows brackets and strings only, so what it finds `complete` may still not be valid JSON. What it rejects
    (`over`, and not `complete`) is no JSON object, or one that is larger or deeper than `json_object.parse` allows."""

    __slots__ = ("_closers", "_escaped", "_in_string", "_left", "complete", "over")

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._in_string = False
        self._escaped = False
        self._left = json_object.MAX_BYTES
        self.over = False
        self.complete = False

    def feed(self, text: str, begin: int) -> int:
        """Goes on with the text at `begin`. Returns how far it may belong to the object: up to the object's end if that
        is `complete` now; if it is `over` without that, up to the first character that can't belong to one."""
        place, end = begin, min(len(text), begin + self._left)
        while place < end and not self.over:
            place = self._string(text, place, end) if self._in_string else self._structure(text, place, end)
        self._left -= place - begin
        self.over = self.over or not self._left
        return place

    def _string(self, text: str, place: int, end: int) -> int:
        if self._escaped:  # anything but a sign: which characters may be escaped is left to the parser
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
    """The end of the match at `place`; `place` itself if nothing matches."""
    match = pattern.match(text, place, end)
    return place if match is None else match.end()
