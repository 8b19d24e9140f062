"""Streamed text, trimmed of white space where something was taken out of it."""

BLANKS = " \t\r\n"


class Trimmed:
    """White space at the end is held back until it is known what follows. It is dropped between something that was
    taken out and the beginning or end of the whole text, and kept between two pieces of text, even if something was
    taken out between them."""

    __slots__ = ("_begun", "_beside", "_blanks", "_certain")

    def __init__(self) -> None:
        self._begun = False
        self._beside = False  # something was taken out since the last text
        self._blanks: list[str] = []
        self._certain: list[str] = []

    def give(self, text: str) -> None:
        stripped = text.rstrip(BLANKS)
        trailing = text[len(stripped) :]
        if stripped:
            if self._beside and not self._begun:
                stripped = stripped.lstrip(BLANKS)
            else:
                self._certain += self._blanks
            self._certain.append(stripped)
            self._blanks.clear()
            self._begun, self._beside = True, False
        self._blanks.append(trailing)

    def taken_out(self) -> None:
        """Something was taken out here."""
        self._beside = True

    def finish(self) -> None:
        """The text is over."""
        if not self._beside:
            self._certain += self._blanks

    def take(self) -> str:
        """Returns what has become certain since the last call."""
        certain, self._certain = self._certain, []
        return "".join(certain)
