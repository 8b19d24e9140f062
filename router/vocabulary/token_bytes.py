"""The bytes of each token of a vocabulary."""

import json
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from common.model.model_error import ModelError

SPACE = "\u2581"  # as SentencePiece-like vocabularies write it


class UnsupportedTokenizer(ModelError):
    """A tokenizer with a decoder that the router does not support."""


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """The bytes of every token, by id; empty for ids that the tokenizer does not know.

    Attributes:
        table: the bytes.
        special: ids of the special tokens.
        strip_leading_space: a text begins without its first space.
        opening: the bytes of a token with which a text begins, where such a token loses all of its spaces.
    """

    table: tuple[bytes, ...]
    special: frozenset[int]
    strip_leading_space: bool
    opening: tuple[bytes, ...] | None = None

    def without_special(self) -> tuple[bytes, ...]:
        """The table with special tokens empty."""
        return tuple(b"" if token in self.special else text for token, text in enumerate(self.table))


def read(tokenizer: Tokenizer, vocab_size: int) -> TokenBytes:
    """Reads the table of a tokenizer whose decoder is byte-level or like SentencePiece's.

    Raises:
        UnsupportedTokenizer: the decoder is of another kind, which the message names.
    """
    decoder: dict[str, Any] = {"type": "none"}
    if tokenizer.decoder is not None:
        decoder = json.loads(cast(bytes, tokenizer.decoder.__getstate__()))
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    drops_spaces = False
    if kinds == ["ByteLevel"]:
        to_bytes, strip = _byte_level, False
    elif kinds == ["Metaspace"]:
        to_bytes, strip = _plain_piece, False
        drops_spaces = steps[0].get("prepend_scheme", "always") != "never"
    elif "Replace" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        to_bytes = _piece_or_byte if "ByteFallback" in kinds else _plain_piece
        strip = any(step["type"] == "Strip" and step["start"] > 0 for step in steps)
    else:
        raise UnsupportedTokenizer(
            f"the tokenizer's decoder {kinds} is not supported; ByteLevel and SentencePiece-like are"
        )
    size = max(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True))
    # By id: the vocabulary has added tokens as they were given, and `decode` what the normalizer makes of them.
    tokens = [tokenizer.id_to_token(index) or "" for index in range(size)]
    opening = tuple(to_bytes(token.replace(SPACE, "")) for token in tokens) if drops_spaces else None
    special = frozenset(index for index, added in tokenizer.get_added_tokens_decoder().items() if added.special)
    return TokenBytes(tuple(map(to_bytes, tokens)), special, strip, opening)


def _byte_of_character() -> dict[str, int]:
    """How byte-level vocabularies (GPT-2's) write bytes: printable Latin-1 as itself, the rest as characters from
    U+0100."""
    visible = [byte for byte in range(256) if chr(byte) in set(ByteLevel.alphabet())]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()  # an added token, which is not byte-encoded


def _plain_piece(token: str) -> bytes:
    return token.replace(SPACE, " ").encode()


def _piece_or_byte(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return _plain_piece(token)
