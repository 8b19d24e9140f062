from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.kv.block_pool import BlockPool, OutOfBlocks


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


class PoolAgainstModel(RuleBasedStateMachine):
    """Drives the pool as sequences do and compares it with dictionaries and a list that are obviously right."""

    @initialize(num_blocks=st.integers(1, 9))
    def start(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.pool = BlockPool(num_blocks)
        self.held: list[list[int]] = []
        self.found: dict[bytes, int] = {}
        self.cached: list[int] = []  # the next to be evicted first
        self.generations = [0] * num_blocks

    def references(self) -> Counter[int]:
        return Counter(block for blocks in self.held for block in blocks)

    @rule(n=st.integers(0, 10))
    def allocate(self, n: int) -> None:
        in_use = self.references()
        free = set(range(self.num_blocks)) - set(in_use) - set(self.cached)
        if n > len(free) + len(self.cached):
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(n)
            return
        blocks = self.pool.allocate(n)
        evicted = self.cached[: max(0, n - len(free))]
        assert len(blocks) == len(set(blocks)) == n
        assert not set(blocks) & set(in_use)
        assert set(blocks) <= free | set(evicted)
        assert [block for block in blocks if block in evicted] == evicted
        del self.cached[: len(evicted)]
        self.found = {key: block for key, block in self.found.items() if block not in evicted}
        for block in blocks:
            self.generations[block] += 1
        self.held.append(blocks)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), number=st.integers(0, 6))
    def publish(self, data: st.DataObject, number: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.references())))
        own = [key for key, known in self.found.items() if known == block]
        if own and own[0] != name(number):
            with pytest.raises(ValueError, match="another hash"):
                self.pool.publish(block, name(number))
            return
        self.pool.publish(block, name(number))
        self.found.setdefault(name(number), block)

    @rule(numbers=st.lists(st.integers(0, 7), max_size=5))
    def match(self, numbers: list[int]) -> None:
        hashes = [name(number) for number in numbers]
        expected = []
        for key in hashes:
            if key not in self.found:
                break
            expected.append(self.found[key])
        assert self.pool.match(hashes) == expected
        self.cached = [block for block in self.cached if block not in expected]
        self.held.append(expected)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        references = self.references()
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(blocks)
        for block in reversed(blocks):
            references[block] -= 1
            if references[block] == 0 and block in self.found.values():
                self.cached.append(block)

    @rule(data=st.data())
    def release_what_nobody_holds(self, data: st.DataObject) -> None:
        unheld = sorted(set(range(self.num_blocks)) - set(self.references()))
        if unheld:
            block = data.draw(st.sampled_from(unheld))
            with pytest.raises(ValueError, match="nobody holds"):
                self.pool.release([block])
            with pytest.raises(ValueError, match="nobody holds"):
                self.pool.publish(block, name(0))

    @invariant()
    def counts_agree(self) -> None:
        in_use = set(self.references())
        assert self.pool.in_use_count == len(in_use)
        assert self.pool.cached_count == len(self.cached)
        assert self.pool.free_count == self.num_blocks - len(in_use) - len(self.cached)
        assert self.pool.available == self.num_blocks - len(in_use)

    @invariant()
    def only_published_blocks_are_found(self) -> None:
        for number in range(8):
            assert self.pool.finds(name(number)) == (name(number) in self.found)

    @invariant()
    def generations_rise_with_every_allocation_and_nothing_else(self) -> None:
        assert [self.pool.generation(block) for block in range(self.num_blocks)] == self.generations

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for blocks in self.held:
            self.pool.release(blocks)
        assert self.pool.in_use_count == 0
        assert sorted(self.pool.allocate(self.num_blocks)) == list(range(self.num_blocks))
        assert not any(self.pool.finds(name(number)) for number in range(8))


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


def test_a_chain_loses_its_tail_first() -> None:
    pool = BlockPool(4)
    chain = pool.allocate(4)
    for number, block in enumerate(chain):
        pool.publish(block, name(number))
    pool.release(chain)
    pool.release(pool.allocate(1))
    assert [pool.finds(name(number)) for number in range(4)] == [True, True, True, False]
    assert pool.match([name(0), name(1), name(2), name(3)]) == chain[:3]


def test_a_duplicate_stays_with_its_holder_and_is_free_afterwards() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.publish(first, name(1))
    pool.publish(second, name(1))
    assert pool.match([name(1)]) == [first]
    pool.release([first])
    pool.release([second])
    assert (pool.free_count, pool.cached_count, pool.in_use_count) == (1, 0, 1)
    pool.release([first])
    assert (pool.free_count, pool.cached_count) == (1, 1)


def test_a_refused_allocation_changes_nothing() -> None:
    pool = BlockPool(3)
    (cached,) = pool.allocate(1)
    pool.publish(cached, name(1))
    pool.release([cached])
    pool.allocate(1)
    with pytest.raises(OutOfBlocks, match="3 blocks wanted, 2 of 3 available"):
        pool.allocate(3)
    assert pool.available == 2
    assert pool.finds(name(1))
    assert pool.generation(cached) == 1


def test_generations_are_kept_in_the_memory_given() -> None:
    generations = [7, 7]
    pool = BlockPool(2, generations)
    pool.release(pool.allocate(2))
    pool.allocate(1)
    assert sorted(generations) == [8, 9]
    with pytest.raises(ValueError, match="2 generations for 3 blocks"):
        BlockPool(3, generations)


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_sizes_that_make_no_sense(num_blocks: int) -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(num_blocks)
    with pytest.raises(ValueError, match="cannot allocate"):
        BlockPool(1).allocate(-1)
