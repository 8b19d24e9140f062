"""The text of tokens that have the same text wherever they stand."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from router.vocabulary.token_bytes import TokenBytes

# A longer text makes a message larger than is expected of one token.
MOST_BYTES = 200


class Words:
    """A token is a word if its bytes are whole characters, few of them, and it is neither special nor ends answers.

    Args:
        ends: tokens that end answers.

    Attributes:
        texts: of each token; nothing for those that are no words.
        words: bool, by token, whether it is one.
        others: the tokens that are none.
    """

    def __init__(self, known: TokenBytes, ends: Iterable[int]) -> None:
        not_words = known.special.union(ends)
        self.texts = ["" if token in not_words else _word(text) for token, text in enumerate(known.table)]
        self.words: NDArray[np.bool_] = np.array(list(map(bool, self.texts)))
        self.others = frozenset(np.flatnonzero(~self.words).tolist())


def _word(text: bytes) -> str:
    if len(text) > MOST_BYTES:
        return ""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return ""
