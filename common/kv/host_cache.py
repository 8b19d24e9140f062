"""KV blocks in host memory, from which a pool gets back what it had to give up.

Every block that becomes findable in the pool is copied here at once, while it is certain to be there; so evicting it
later costs nothing, and nobody waits for a copy but who wants the block back. The copying reads the pool as a peer
does: it holds no block, and keeps what it read only if the block's generation is still the same afterwards.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.kv.block_pool import BlockPool
from common.start_error import StartError


class HostMemoryError(StartError):
    """So much memory of the host cannot be had. Its text is a sentence that says why and what to change."""


class Copy(Protocol):
    """Blocks on their way between the pool and host memory."""

    def done(self) -> bool:
        """Whether they are there, without waiting. Raises what went wrong with the device."""


class HostMemory(Protocol):
    """Memory of the host for as many blocks as `num_blocks` says, beside a pool."""

    @property
    def num_blocks(self) -> int: ...

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> Copy:
        """Starts to copy the pool's `blocks` into `slots` of this memory, pair by pair, and returns at once."""

    def load(self, slots: Sequence[int], blocks: Sequence[int]) -> Copy:
        """Starts to copy `slots` of this memory into the pool's `blocks`, pair by pair, and returns at once."""

    def close(self) -> None:
        """Waits for copies under way. The memory is freed with this object."""


class Load:
    """Blocks that come back into the pool. Until they have arrived, nobody else may use the pool's blocks."""

    def __init__(self, copy: Copy, slots: list[int], books: BlockPool) -> None:
        self._copy = copy
        self._slots = slots
        self._books = books
        self.count = len(slots)

    def arrived(self) -> bool:
        """Whether they are there, without waiting. To be asked until they are: then the slots are let go."""
        if not self._copy.done():
            return False
        slots, self._slots = self._slots, []
        self._books.release(slots)
        return True


@dataclass(frozen=True, slots=True)
class _Save:
    copy: Copy
    blocks: dict[bytes, tuple[int, int]]  # by hash: block of the pool, and its generation when it was published
    slots: list[int]


class HostCache:
    """Copies of the pool's blocks, by hash. The least recently used give way to new ones.

    Like the pool, it belongs to one engine loop.

    Args:
        pool: whose blocks are kept here. Its `on_publish` becomes this object's.
        memory: where.

    Attributes:
        slots: the bookkeeping of that memory. A slot is in use while it is copied to or from.
    """

    def __init__(self, pool: BlockPool, memory: HostMemory) -> None:
        self.slots = BlockPool(memory.num_blocks)
        self._pool = pool
        self._memory = memory
        self._published: deque[tuple[bytes, int, int]] = deque(maxlen=pool.num_blocks)  # hash, block, generation
        self._save: _Save | None = None
        pool.on_publish = self._note

    def finds(self, block_hash: bytes) -> bool:
        """Whether `load` would find it now."""
        return self.slots.finds(block_hash)

    def touch(self, hashes: Sequence[bytes]) -> None:
        """A request has used blocks with these hashes in the pool: their copies here stay as long as if they had been
        loaded."""
        self.slots.release(self.slots.match(hashes))

    def load(self, hashes: Sequence[bytes], blocks: Sequence[int]) -> Load | None:
        """Starts to copy the longest run of leading `hashes` that is found here into the pool's `blocks`, pair by pair.
        None if not even the first is found."""
        slots = self.slots.match(hashes)
        return Load(self._memory.load(slots, blocks[: len(slots)]), slots, self.slots) if slots else None

    def turn(self) -> None:
        """Takes in the copies that have arrived, and starts to copy what was published since."""
        if self._save is not None and self._save.copy.done():
            self._take(self._save)
            self._save = None
        if self._save is None and self._published:
            self._save = self._begin()

    @property
    def settled(self) -> bool:
        """Whether all that was published is here, as far as there is room."""
        return self._save is None and not self._published

    def close(self) -> None:
        self._memory.close()

    def _note(self, block: int, block_hash: bytes) -> None:
        if not self.slots.finds(block_hash):
            self._published.append((block_hash, block, self._pool.generation(block)))

    def _begin(self) -> _Save | None:
        wanted: dict[bytes, tuple[int, int]] = {}
        while self._published and len(wanted) < self.slots.available:
            block_hash, block, generation = self._published.popleft()
            if self._pool.generation(block) == generation and not self.slots.finds(block_hash):
                wanted[block_hash] = block, generation
        if not wanted:
            return None
        slots = self.slots.allocate(len(wanted))
        return _Save(self._memory.save([block for block, _ in wanted.values()], slots), wanted, slots)

    def _take(self, save: _Save) -> None:
        for slot, (block_hash, (block, generation)) in zip(save.slots, save.blocks.items(), strict=True):
            if self._pool.generation(block) == generation:
                self.slots.publish(slot, block_hash)
        self.slots.release(save.slots)
