"""Equal sets of tokens as one object."""

from functools import lru_cache


@lru_cache(maxsize=256)
def one_of(tokens: frozenset[int]) -> frozenset[int]:
    """The first of the sets that equal this one, while it is remembered.

    Most requests stop at the same tokens, and every token of every answer is looked up in their sets. As an object of
    each request they are seldom in the processor's caches by then.
    """
    return tokens
