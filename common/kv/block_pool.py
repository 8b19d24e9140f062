"""Who holds which block of a worker's KV pool, and which finished blocks can be found again by their hash.

Pure bookkeeping: no tensor is touched here. Every operation is O(1) per block: the order of eviction is a doubly linked
list threaded through two arrays, so taking a block out of its middle (a prefix hit) costs as much as one off its end.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol


class OutOfBlocks(Exception):
    """Fewer blocks are available than were asked for; none was taken."""


class Generations(Protocol):
    """Counters, one for each block: a list, or a memoryview of 64-bit integers that other processes can read."""

    def __len__(self) -> int: ...

    def __getitem__(self, block: int, /) -> int: ...

    def __setitem__(self, block: int, generation: int, /) -> None: ...


class BlockPool:
    """Reference counts, hashes, generations and eviction order of `num_blocks` blocks, numbered from 0.

    A block is *in use* (it has references), *cached* (no reference, but its hash can still be found) or *free*; the
    three counts always add up to `num_blocks`. Not thread-safe: one engine loop owns it.

    Args:
        num_blocks: blocks of the pool.
        generations: one counter for each block, in memory that peers can read; its values are kept. `allocate` raises
            a block's counter each time, before the new owner can write to the block. So a peer that copied a block, and
            afterwards still finds the generation it was told, has copied what it meant to.

    Attributes:
        on_publish: told of each block that becomes findable, with its hash.
    """

    on_publish: Callable[[int, bytes], None] | None = None

    def __init__(self, num_blocks: int, generations: Generations | None = None) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        if generations is None:
            generations = [0] * num_blocks
        elif len(generations) != num_blocks:
            raise ValueError(f"{len(generations)} generations for {num_blocks} blocks")
        self.num_blocks = num_blocks
        self._generations = generations
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        # Cached blocks form a ring with num_blocks as its sentinel: newer[sentinel] is the next block to be evicted.
        self._newer = [num_blocks] * (num_blocks + 1)
        self._older = [num_blocks] * (num_blocks + 1)
        self._cached_count = 0
        self._changes: dict[bytes, bool] | None = None

    @property
    def free_count(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def cached_count(self) -> int:
        """Blocks that nobody holds but that can be found by their hash until they are evicted."""
        return self._cached_count

    @property
    def in_use_count(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - len(self._free) - self._cached_count

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out now: free and cached ones."""
        return len(self._free) + self._cached_count

    def generation(self, block: int) -> int:
        return self._generations[block]

    def finds(self, block_hash: bytes) -> bool:
        """Whether `match` would find it now. Takes no reference and leaves the eviction order alone."""
        return block_hash in self._by_hash

    def take_changes(self) -> dict[bytes, bool] | None:
        """Hashes that became findable (True) or were forgotten (False) since the last call, each with its latest state.

        None if there is no record of that: at the first call, and after more changes than are worth keeping. Then ask
        `hashes` for everything that can be found.
        """
        changes, self._changes = self._changes, {}
        return changes

    def hashes(self) -> Iterable[bytes]:
        """All hashes that can be found."""
        return self._by_hash.keys()

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest run of leading `hashes` that are found, with a reference taken on each."""
        by_hash, references = self._by_hash, self._references
        older, newer = self._older, self._newer
        blocks: list[int] = []
        for block_hash in hashes:
            block = by_hash.get(block_hash)
            if block is None:
                break
            if references[block] == 0:
                before, after = older[block], newer[block]
                newer[before] = after
                older[after] = before
                self._cached_count -= 1
            references[block] += 1
            blocks.append(block)
        return blocks

    def allocate(self, n: int) -> list[int]:
        """Hands out `n` blocks with one reference each: free ones first, then the least recently used of the cached.

        An evicted block's hash is forgotten, and every block's generation is raised by one.

        Raises:
            OutOfBlocks: fewer than `n` are available; the pool is left as it was.
            ValueError: `n` is negative.
        """
        if n < 0:
            raise ValueError(f"cannot allocate {n} blocks")
        if n > self.available:
            raise OutOfBlocks(f"{n} blocks wanted, {self.available} of {self.num_blocks} available")
        references, generations = self._references, self._generations
        blocks = [self._free.pop() for _ in range(min(n, len(self._free)))]
        if len(blocks) < n:
            self._evict(n - len(blocks), blocks)
        for block in blocks:
            references[block] = 1
            generations[block] += 1
        return blocks

    def _evict(self, n: int, evicted: list[int]) -> None:
        newer, hashes, by_hash = self._newer, self._hashes, self._by_hash
        changes = self._changes
        sentinel = self.num_blocks
        block = newer[sentinel]
        for _ in range(n):
            block_hash = hashes[block]
            assert block_hash is not None, "a cached block has a hash"
            del by_hash[block_hash]
            if changes is not None:
                changes[block_hash] = False
            hashes[block] = None
            evicted.append(block)
            block = newer[block]
        newer[sentinel] = block
        self._older[block] = sentinel
        self._cached_count -= n
        if changes is not None and len(changes) > sentinel:
            self._changes = None

    def publish(self, block: int, block_hash: bytes) -> None:
        """Makes a complete block findable by its 16-byte `block_hash`.

        If another block has that hash already, `match` goes on finding that one, and this one becomes free (not cached)
        with its last release. Publishing a block again under its own hash changes nothing.

        Raises:
            ValueError: nobody holds the block, or it has another hash.
        """
        if self._references[block] == 0:
            raise ValueError(f"block {block} is published, but nobody holds it")
        known = self._hashes[block]
        if known is not None and known != block_hash:
            raise ValueError(f"block {block} is already published under another hash")
        if known is None and self._by_hash.setdefault(block_hash, block) == block:
            self._hashes[block] = block_hash
            if self._changes is not None:
                self._changes[block_hash] = True
            if self.on_publish is not None:
                self.on_publish(block, block_hash)

    def release(self, blocks: Iterable[int]) -> None:
        """Drops one reference from each of `blocks`, given in the order of their sequence.

        Blocks without references become cached if they were published, else free. The end of the sequence is released
        first, and so evicted first: without the beginning it could not be found anyway.

        Raises:
            ValueError: nobody holds one of the blocks. Those after it in `blocks` have been released.
        """
        references, hashes = self._references, self._hashes
        older, newer = self._older, self._newer
        sentinel = self.num_blocks
        for block in reversed(tuple(blocks)):
            count = references[block] - 1
            if count < 0:
                raise ValueError(f"block {block} is released, but nobody holds it")
            references[block] = count
            if count:
                continue
            if hashes[block] is None:
                self._free.append(block)
            else:
                newest = older[sentinel]
                newer[newest] = older[sentinel] = block
                older[block] = newest
                newer[block] = sentinel
                self._cached_count += 1
