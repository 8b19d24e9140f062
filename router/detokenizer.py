"""Tokens to text, piece by piece, without cutting a UTF-8 character."""

import codecs
from collections.abc import Sequence

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Gives out a growing sequence's text as soon as it is certain; all pieces together are the tokenizer's `decode`.

    Bytes that are no UTF-8 become U+FFFD, as there. One difference, in vocabularies with tokens for single bytes beside
    pieces of text: where a run of those is invalid, `decode` replaces every byte of it, and this only the invalid ones.
    """

    __slots__ = ("_decoder", "_strip", "_table")

    def __init__(self, table: Sequence[bytes], strip_leading_space: bool) -> None:
        self._table = table
        self._strip = strip_leading_space
        self._decoder = _new_decoder("replace")

    def feed(self, tokens: Sequence[int]) -> str:
        table = self._table
        return self._without_leading_space(self._decoder.decode(b"".join([table[token] for token in tokens])))

    def finish(self) -> str:
        """What is left: a replacement character where the sequence ended inside a character."""
        return self._without_leading_space(self._decoder.decode(b"", True))

    def _without_leading_space(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
