"""Incremental detokenization, without cutting UTF-8 characters."""

import codecs
from collections.abc import Mapping, Sequence

NO_SIGNS: Mapping[int, str] = {}

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Returns the text of a growing sequence as soon as it is certain. All pieces together are what the tokenizer's
    `decode` returns.

    Invalid UTF-8 becomes U+FFFD, as there. One difference, in vocabularies with tokens for single bytes (byte
    fallback): in an invalid run of those `decode` replaces every byte, and this only the invalid ones.

    Args:
        table: the bytes of each token.
        strip_leading_space: drops one space from the beginning of the text.
        opening: the bytes of the first token that has any, if they are others.
        signs: text for some tokens, in place of their bytes; it may contain lone surrogates.

    Attributes:
        takes_words: the text of a token that comes next is that of its bytes, if these are whole characters and it has
            no sign.
    """

    __slots__ = ("_decoder", "_opening", "_signs", "_strip", "_table", "takes_words")

    def __init__(
        self,
        table: Sequence[bytes],
        strip_leading_space: bool,
        opening: Sequence[bytes] | None = None,
        signs: Mapping[int, str] = NO_SIGNS,
    ) -> None:
        self._table = table
        self._strip = strip_leading_space
        self._opening = opening
        self._signs = signs
        self._decoder = _new_decoder("replace")
        self.takes_words = False

    def feed(self, tokens: Sequence[int]) -> str:
        if self.takes_words and len(tokens) == 1 and tokens[0] not in self._signs:
            try:  # nearly all tokens are whole characters, and this takes a third of the time
                return self._table[tokens[0]].decode()
            except UnicodeDecodeError:
                pass
        if self._signs and not self._signs.keys().isdisjoint(tokens):
            return self._feed_with_signs(tokens)
        return self._decoded(tokens)

    def finish(self) -> str:
        """The rest: U+FFFD if the sequence ended inside a character, else nothing."""
        return self._without_leading_space(self._decoder.decode(b"", True))

    def _feed_with_signs(self, tokens: Sequence[int]) -> str:
        """A character that is incomplete before a sign can't be completed after it."""
        pieces: list[str] = []
        for token in tokens:
            sign = self._signs.get(token)
            if sign is None:
                pieces.append(self._decoded((token,)))
            else:
                pieces += self.finish(), sign
        return "".join(pieces)

    def _decoded(self, tokens: Sequence[int]) -> str:
        spelled = [self._table[token] for token in tokens]
        if self._opening is not None:
            first = next((place for place, text in enumerate(spelled) if text), None)
            if first is not None:
                spelled[first] = self._opening[tokens[first]]
                self._opening = None
        text = self._decoder.decode(b"".join(spelled))
        text = self._without_leading_space(text)
        begins_character = bool(self._decoder.getstate()[0])
        self.takes_words = self._opening is None and not self._strip and not begins_character
        return text

    def _without_leading_space(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
