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

# Copies are launched in parts of so many blocks, and so many of these are under way at once in each direction: what is
# launched in one turn must not keep the engine, and what a device is told ahead has a limit, behind which it waits.
PART_BLOCKS = 256
PARTS_AT_ONCE = 2


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

    def __init__(self, slots: list[int], blocks: list[int], books: BlockPool) -> None:
        self._slots = slots
        self._blocks = blocks
        self._books = books
        self._launched = 0
        self._last: Copy | None = None
        self.count = len(slots)

    @property
    def launched(self) -> bool:
        return self._launched == self.count

    def launch(self, memory: HostMemory) -> Copy:
        """Launches the next part of it."""
        part = slice(self._launched, self._launched + PART_BLOCKS)
        self._launched = min(part.stop, self.count)
        self._last = memory.load(self._slots[part], self._blocks[part])
        return self._last

    def arrived(self) -> bool:
        """Whether they are there, without waiting. To be asked until they are: then the slots are let go."""
        if not self.launched or self._last is None or not self._last.done():
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
        memory: where. It copies in order, in each direction.

    Attributes:
        slots: the bookkeeping of that memory. A slot is in use while it is copied to or from.
    """

    def __init__(self, pool: BlockPool, memory: HostMemory) -> None:
        self.slots = BlockPool(memory.num_blocks)
        self._pool = pool
        self._memory = memory
        self._published: deque[tuple[bytes, int, int]] = deque(maxlen=pool.num_blocks)  # hash, block, generation
        self._saves: deque[_Save] = deque()
        self._loads: deque[Load] = deque()  # with parts to launch
        self._parts: deque[Copy] = deque()  # of loads, under way
        pool.on_publish = self._note

    def finds(self, block_hash: bytes) -> bool:
        """Whether `load` would find it now."""
        return self.slots.finds(block_hash)

    def touch(self, hashes: Sequence[bytes]) -> None:
        """A request has used blocks with these hashes, wherever they were: they are the last to give way from here, the
        end of the chain before its beginning."""
        self.slots.release(self.slots.match(hashes))

    def load(self, hashes: Sequence[bytes], blocks: Sequence[int]) -> Load | None:
        """Begins to copy the longest run of leading `hashes` that is found here into the pool's `blocks`, pair by pair.
        None if not even the first is found."""
        slots = self.slots.match(hashes)
        if not slots:
            return None
        load = Load(slots, list(blocks[: len(slots)]), self.slots)
        self._loads.append(load)
        self._launch_loads()
        return load

    def turn(self) -> None:
        """Takes in what has been saved, saves what was published since, and goes on with loads."""
        self._launch_loads()
        while self._saves and self._saves[0].copy.done():
            self._take(self._saves.popleft())
        while self._published and len(self._saves) < PARTS_AT_ONCE and (save := self._begin_save()) is not None:
            self._saves.append(save)

    @property
    def all_saved(self) -> bool:
        """Whether all that was published is here, as far as there is room."""
        return not self._saves and not self._published

    def close(self) -> None:
        self._memory.close()

    def _launch_loads(self) -> None:
        while self._parts and self._parts[0].done():
            self._parts.popleft()
        while self._loads and len(self._parts) < PARTS_AT_ONCE:
            self._parts.append(self._loads[0].launch(self._memory))
            if self._loads[0].launched:
                self._loads.popleft()

    def _note(self, block: int, block_hash: bytes) -> None:
        if not self.slots.finds(block_hash):
            self._published.append((block_hash, block, self._pool.generation(block)))

    def _begin_save(self) -> _Save | None:
        """None if nothing of what was published is worth it any more, or there is no slot."""
        most = min(self.slots.available, PART_BLOCKS)
        wanted: dict[bytes, tuple[int, int]] = {}
        while self._published and len(wanted) < most:
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
