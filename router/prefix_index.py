"""Which blocks a worker's cache can find, as far as the router knows."""

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from itertools import islice, takewhile

from common.prefix_hash import HASH_BYTES
from twostroke.v1 import worker_pb2


class PrefixIndex:
    """The hashes that a worker reported, and those of the attempts under way there, which it will report soon."""

    def __init__(self) -> None:
        self.published: set[bytes] = set()
        self._under_way: Counter[bytes] = Counter()
        self._computed_here: Counter[bytes] = Counter()  # those under way that no other worker computes

    def __len__(self) -> int:
        return len(self.published)

    def apply(self, changes: worker_pb2.CacheChanges) -> None:
        if changes.snapshot:
            self.published.clear()
        self.published.update(_unpacked(changes.published))
        self.published.difference_update(_unpacked(changes.dropped))

    def begin(self, hashes: Sequence[bytes], computed_here: bool) -> None:
        """An attempt with these blocks is under way."""
        self._under_way.update(hashes)
        if computed_here:
            self._computed_here.update(hashes)

    def end(self, hashes: Sequence[bytes], computed_here: bool) -> None:
        """Undoes one `begin`."""
        _take_away(self._under_way, hashes)
        if computed_here:
            _take_away(self._computed_here, hashes)

    def hits(self, hashes: Sequence[bytes]) -> int:
        """How many of the leading `hashes` are in the cache, or will be when what is under way is there."""
        return _leading_in_either(self.published, self._under_way, hashes)

    def computed(self, hashes: Sequence[bytes]) -> int:
        """How many of the leading `hashes` a prompt that is computed here will find: those in the cache, and those of
        prompts before it. What a prefill worker still computes may come much later."""
        return _leading_in_either(self.published, self._computed_here, hashes)

    def shared(self, hashes: Sequence[bytes]) -> int:
        """How many of the leading `hashes` are in the cache and in use: a sequence takes no room for these."""
        return min(_leading(self.published, hashes), _leading(self._under_way, hashes))

    def may_have_computed(self, name: bytes) -> bool:
        """False where `computed` is sure to end before this hash."""
        return name in self.published or name in self._computed_here


def _take_away(counter: Counter[bytes], hashes: Iterable[bytes]) -> None:
    for name in hashes:
        counter[name] -= 1
        if not counter[name]:
            del counter[name]


def _leading(found: Container[bytes], hashes: Sequence[bytes], start: int = 0) -> int:
    # Thousands of blocks, for each request that waits and each worker: this loop is one that Python does not run.
    return len(list(takewhile(found.__contains__, islice(hashes, start, None))))


def _leading_in_either(one: Container[bytes], other: Container[bytes], hashes: Sequence[bytes]) -> int:
    count = 0
    while more := _leading(one, hashes, count) or _leading(other, hashes, count):
        count += more
    return count


def _unpacked(hashes: bytes) -> Iterable[bytes]:
    return (hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES))
