"""Tokens to text, piece by piece, without cutting a UTF-8 character."""

import codecs
from collections.abc import Mapping, Sequence

NO_SIGNS: Mapping[int, str] = {}

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Gives out a growing sequence's text as soon as it is certain; all pieces together are the tokenizer's `decode`.

    Bytes that are no UTF-8 become U+FFFD, as there. One difference, in vocabularies with tokens for single bytes beside
    pieces of text: where a run of those is invalid, `decode` replaces every byte of it, and this only the invalid ones.

    Args:
        table: each token's bytes.
        strip_leading_space: from the first text.
        signs: what stands for some tokens, whatever their bytes are. It may be no text that UTF-8 could spell.
    """

    __slots__ = ("_decoder", "_signs", "_strip", "_table")

    def __init__(self, table: Sequence[bytes], strip_leading_space: bool, signs: Mapping[int, str] = NO_SIGNS) -> None:
        self._table = table
        self._strip = strip_leading_space
        self._signs = signs
        self._decoder = _new_decoder("replace")

    def feed(self, tokens: Sequence[int]) -> str:
        if self._signs and not self._signs.keys().isdisjoint(tokens):
            return self._feed_with_signs(tokens)
        table = self._table
        return self._without_leading_space(self._decoder.decode(b"".join([table[token] for token in tokens])))

    def finish(self) -> str:
        """What is left: a replacement character where the sequence ended inside a character."""
        return self._without_leading_space(self._decoder.decode(b"", True))

    def _feed_with_signs(self, tokens: Sequence[int]) -> str:
        """A character that is not whole where a sign comes never will be."""
        pieces: list[str] = []
        for token in tokens:
            sign = self._signs.get(token)
            if sign is None:
                pieces.append(self._without_leading_space(self._decoder.decode(self._table[token])))
            else:
                pieces += self.finish(), sign
        return "".join(pieces)

    def _without_leading_space(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
