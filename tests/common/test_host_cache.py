"""What comes back from host memory is what was published under its hash, whenever copies arrive."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.device import cpu_memory
from common.kv import host_cache, host_memory, host_room, kv_pool
from common.kv.block_pool import BlockPool
from common.kv.host_cache import HostCache, Load
from common.kv.host_room import HostMemoryError
from common.kv.kv_pool import KvLayout, KvPool

LAYOUT = KvLayout(num_blocks=6, num_layers=2, block_size=4, num_kv_heads=1, head_dim=8, dtype="bfloat16")
GIB = 2**30


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


class SlowCopy:
    def __init__(self, source: list[int], src: Sequence[int], target: list[int], dst: Sequence[int]) -> None:
        self._source, self._target = source, target
        self._left = list(zip(src, dst, strict=True))

    def go_on(self) -> None:
        """Copies one block more, if any is left."""
        if self._left:
            src, dst = self._left.pop()
            self._target[dst] = self._source[src]

    def done(self) -> bool:
        return not self._left

    @property
    def left(self) -> int:
        return len(self._left)


class SlowMemory:
    """Copies a block when it is told to. A block's content is a number."""

    def __init__(self, pool: list[int], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.pool, self.host = pool, [0] * num_blocks
        self.under_way: list[SlowCopy] = []

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> SlowCopy:
        return self._begin(SlowCopy(self.pool, blocks, self.host, slots))

    def load(self, slots: Sequence[int], blocks: Sequence[int]) -> SlowCopy:
        return self._begin(SlowCopy(self.host, slots, self.pool, blocks))

    def close(self) -> None:
        pass

    def go_on(self, index: int) -> None:
        self.under_way[index].go_on()
        self.under_way = [copy for copy in self.under_way if not copy.done()]

    def _begin(self, copy: SlowCopy) -> SlowCopy:
        self.under_way.append(copy)
        return copy


@dataclass(frozen=True, slots=True)
class Prompt:
    numbers: list[int]  # what its blocks are to contain
    blocks: list[int]
    found: int  # blocks that were in the pool
    load: Load | None


class HostCacheAgainstContents(RuleBasedStateMachine):
    """Prompts that find, load or compute blocks and let them go; a block with the hash `name(n)` must contain n."""

    @initialize(blocks=st.integers(2, 6), slots=st.integers(1, 9))
    def start(self, blocks: int, slots: int) -> None:
        self.pool = BlockPool(blocks)
        self.memory = SlowMemory([0] * blocks, slots)
        self.cache = HostCache(self.pool, self.memory)
        self.loading: list[Prompt] = []
        self.complete: list[Prompt] = []

    @rule(numbers=st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True))
    def admit(self, numbers: list[int]) -> None:
        hashes = [name(number) for number in numbers]
        blocks = self.pool.match(hashes)
        found, missing = len(blocks), len(numbers) - len(blocks)
        if missing > self.pool.available:
            self.pool.release(blocks)
            return
        blocks += self.pool.allocate(missing)
        for block in blocks[found:]:
            self.memory.pool[block] = -1
        prompt = Prompt(numbers, blocks, found, self.cache.load(hashes[found:], blocks[found:]))
        if prompt.load is None:
            self.compute(prompt)
        else:
            self.loading.append(prompt)

    @rule()
    def end_loads(self) -> None:
        loading, self.loading = self.loading, []
        for prompt in loading:
            assert prompt.load is not None
            if prompt.load.arrived():
                self.compute(prompt)
            else:
                self.loading.append(prompt)

    def compute(self, prompt: Prompt) -> None:
        """Publishes what was loaded, and the rest with its content."""
        loaded = prompt.load.count if prompt.load is not None else 0
        for index in range(prompt.found, len(prompt.blocks)):
            block, number = prompt.blocks[index], prompt.numbers[index]
            if index >= prompt.found + loaded:
                self.memory.pool[block] = number
            self.pool.publish(block, name(number))
        self.cache.touch([name(number) for number in prompt.numbers])
        self.complete.append(prompt)

    @precondition(lambda self: self.complete)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.complete) - 1))
        self.pool.release(self.complete.pop(index).blocks)

    @precondition(lambda self: self.memory.under_way)
    @rule(data=st.data())
    def copy_a_block(self, data: st.DataObject) -> None:
        self.memory.go_on(data.draw(st.integers(0, len(self.memory.under_way) - 1)))

    @rule()
    def turn(self) -> None:
        self.cache.turn()

    @invariant()
    def what_is_found_is_what_its_hash_says(self) -> None:
        for books, contents in ((self.pool, self.memory.pool), (self.cache.slots, self.memory.host)):
            for block_hash, block in books._by_hash.items():
                assert name(contents[block]) == block_hash
            assert books.free_count + books.cached_count + books.in_use_count == books.num_blocks

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        while self.memory.under_way or not self.cache.all_saved or self.loading:
            if self.memory.under_way:
                self.memory.go_on(0)
            self.end_loads()
            self.cache.turn()
        for prompt in self.complete:
            self.pool.release(prompt.blocks)
        assert (self.pool.in_use_count, self.cache.slots.in_use_count) == (0, 0)


TestHostCacheAgainstContents = HostCacheAgainstContents.TestCase
TestHostCacheAgainstContents.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


# ------------------------------------------------------------ on a CPU


def pool_of_noise() -> KvPool:
    pool = kv_pool.allocate(LAYOUT, torch.device("cpu"))
    pool.tensor.normal_(generator=torch.Generator().manual_seed(0))
    return pool


def wait_for(cache: HostCache) -> None:
    while not cache.all_saved:
        cache.turn()


def publish(blocks: BlockPool, count: int, first: int = 0) -> list[int]:
    """Takes blocks and publishes them by the numbers from `first` on."""
    taken = blocks.allocate(count)
    for number, block in enumerate(taken, first):
        blocks.publish(block, name(number))
    return taken


def test_blocks_that_the_pool_gave_up_come_back_as_they_were() -> None:
    pool, blocks = pool_of_noise(), BlockPool(LAYOUT.num_blocks)
    cache = HostCache(blocks, host_memory.allocate(pool, 20))
    taken = publish(blocks, 5)
    contents = pool.tensor[taken].clone()
    wait_for(cache)
    blocks.release(taken)
    fresh = blocks.allocate(6)
    pool.tensor.zero_()
    assert not blocks.finds(name(0))
    load = cache.load([name(number) for number in range(6)], fresh)
    assert load is not None
    assert load.count == 5
    while not load.arrived():
        cache.turn()
    assert torch.equal(pool.tensor[fresh[:5]], contents)
    assert not pool.tensor[fresh[5]].any()
    assert cache.slots.in_use_count == 0
    cache.close()


def test_what_is_used_in_the_pool_is_not_the_first_to_go_from_host_memory() -> None:
    pool, blocks = pool_of_noise(), BlockPool(LAYOUT.num_blocks)
    cache = HostCache(blocks, host_memory.allocate(pool, 4))
    for first in (0, 2):
        blocks.release(publish(blocks, 2, first))
        wait_for(cache)
    cache.touch([name(0), name(1)])
    blocks.release(publish(blocks, 2, first=4))
    wait_for(cache)
    assert [cache.finds(name(number)) for number in range(6)] == [True, True, False, False, True, True]
    cache.close()


def test_nothing_is_copied_twice() -> None:
    memory = SlowMemory([0] * 6, 8)
    blocks = BlockPool(6)
    cache = HostCache(blocks, memory)
    for _ in range(3):  # the same blocks are lost, computed and published again
        taken = publish(blocks, 2)
        cache.turn()
        while memory.under_way:
            memory.go_on(0)
        cache.turn()
        blocks.release(taken)
        blocks.release(blocks.allocate(6))
    assert cache.slots.cached_count == 2
    assert cache.slots.free_count == 6
    assert sum(cache.slots.generation(slot) for slot in range(8)) == 2


def test_much_is_copied_in_parts_and_a_few_of_these_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cache, "PART_BLOCKS", 4)
    memory, blocks = SlowMemory([0] * 40, 40), BlockPool(40)
    cache = HostCache(blocks, memory)
    taken = publish(blocks, 19)
    for number, block in enumerate(taken):
        memory.pool[block] = number
    parts = []
    while not cache.all_saved:
        cache.turn()
        parts.append([copy.left for copy in memory.under_way])
        while memory.under_way:
            memory.go_on(0)
    assert parts == [[4, 4], [4, 4], [3], []]
    blocks.release(taken)
    fresh = blocks.allocate(40)[:19]
    load = cache.load([name(number) for number in range(19)], fresh)
    assert load is not None
    parts = []
    while not load.arrived():
        parts.append([copy.left for copy in memory.under_way])
        while memory.under_way:
            memory.go_on(0)
        cache.turn()
    assert parts == [[4, 4], [4, 4], [3]]
    assert [memory.pool[block] for block in fresh] == list(range(19))
    assert cache.slots.in_use_count == 0


def test_memory_is_counted_in_blocks() -> None:
    assert host_memory.blocks_in(1, 3_000) == GIB // 3_000
    with pytest.raises(
        HostMemoryError, match=r"--host-cache-gib 1e-07 is less than one KV block, which has 3000 bytes"
    ):
        host_memory.blocks_in(1e-7, 3_000)


def test_memory_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_memory, "available_bytes", lambda: 10 * GIB)
    host_room.check(9)
    host_room.check(3, workers=3)
    for gib in (9.01, float("inf")):
        with pytest.raises(
            HostMemoryError, match=r"--host-cache-gib \S+ is more than nine tenths .* 10\.0 GiB; ask for"
        ):
            host_room.check(gib)
    with pytest.raises(HostMemoryError, match=r"--host-cache-gib 3\.1 for each of 3 workers is more"):
        host_room.check(3.1, workers=3)
