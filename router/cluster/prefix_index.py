"""Which blocks a worker has in its prefix cache, as far as the router knows."""

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from itertools import islice, takewhile

from common.kv import cache_changes
from twostroke.v1 import worker_pb2


class PrefixIndex:
    """The hashes of blocks that a worker has reported, and of the attempts under way there, which it will report
    soon.

    Attributes:
        published: in its pool.
        in_host_memory: what it keeps there; only a prompt that is computed on this worker gets it from there.
    """

    def __init__(self) -> None:
        self.published: set[bytes] = set()
        self.in_host_memory: set[bytes] = set()
        self._under_way: Counter[bytes] = Counter()
        self._computed_here: Counter[bytes] = Counter()  # of those, by this worker: not pulled from another

    def __len__(self) -> int:
        return len(self.published)

    def apply(self, changes: worker_pb2.CacheChanges) -> None:
        _apply(changes, self.published)

    def apply_host(self, changes: worker_pb2.CacheChanges) -> None:
        _apply(changes, self.in_host_memory)

    def begin(self, hashes: Sequence[bytes], computed_here: bool) -> None:
        """An attempt with these blocks begins.

        Args:
            hashes: of its full blocks.
            computed_here: whether this worker computes them, or a prefill worker that it will pull them from.
        """
        self._under_way.update(hashes)
        if computed_here:
            self._computed_here.update(hashes)

    def end(self, hashes: Sequence[bytes], computed_here: bool) -> None:
        """Undoes one `begin`."""
        _take_away(self._under_way, hashes)
        if computed_here:
            _take_away(self._computed_here, hashes)

    def hits(self, hashes: Sequence[bytes], *, computed_here: bool) -> int:
        """How many of the leading `hashes` a sequence that comes now need neither compute nor pull, once the attempts
        under way have their KV. `computed_here`: its prompt is, so that it also gets what is in host memory."""
        places = (self.published, self._under_way)
        return _leading_in_any((*places, self.in_host_memory) if computed_here else places, hashes)

    def computed(self, hashes: Sequence[bytes]) -> int:
        """How many of the leading `hashes` a prompt that is computed here will find: those in the pool or in host
        memory, and those that this worker computes for prompts before it. What a prefill worker still has to compute
        may come much later."""
        return _leading_in_any((self.published, self.in_host_memory, self._computed_here), hashes)

    def loaded(self, hashes: Sequence[bytes], computed: int) -> int:
        """How many of the first `computed` hashes, which a prompt that is computed here will find, are in host memory
        or behind what is."""
        if not self.in_host_memory:
            return 0
        return computed - _leading_in_any((self.published, self._computed_here), hashes)

    def shared(self, hashes: Sequence[bytes]) -> int:
        """How many of the leading `hashes` are both in the pool and in use: for these a sequence takes no more
        room."""
        return min(_leading(self.published, hashes), _leading(self._under_way, hashes))

    def may_share(self, block_hash: bytes) -> bool:
        """False if `shared` is certain not to reach this hash."""
        return block_hash in self.published and block_hash in self._under_way

    def may_have_computed(self, block_hash: bytes) -> bool:
        """False if `computed` is certain not to reach this hash."""
        places = (self.published, self.in_host_memory, self._computed_here)
        return any(block_hash in place for place in places)


def _apply(changes: worker_pb2.CacheChanges, known: set[bytes]) -> None:
    if changes.snapshot:
        known.clear()
    known.update(cache_changes.unpack(changes.published))
    known.difference_update(cache_changes.unpack(changes.dropped))


def _take_away(counter: Counter[bytes], hashes: Iterable[bytes]) -> None:
    for block_hash in hashes:
        counter[block_hash] -= 1
        if not counter[block_hash]:
            del counter[block_hash]


def _leading(found: Container[bytes], hashes: Sequence[bytes], start: int = 0) -> int:
    # There may be thousands of blocks, for each waiting request and each worker, so the loop is left to C.
    return len(list(takewhile(found.__contains__, islice(hashes, start, None))))


def _leading_in_any(places: Iterable[Container[bytes]], hashes: Sequence[bytes]) -> int:
    count = 0
    while more := next(filter(None, (_leading(place, hashes, count) for place in places)), 0):
        count += more
    return count
