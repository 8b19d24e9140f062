"""The prefill worker's queue: budget, chunks, order, prefix hits, and blocks that come home."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from common.kv.block_pool import BlockPool
from common.kv.host_cache import HostCache
from prefill_worker.leases import Leases
from prefill_worker.scheduler import Chunk, Prompt, Scheduler
from tests.specs import spec

BLOCK = 4


def prompt(attempt_id: int, tokens: list[int], connection: int = 0) -> Prompt:
    return Prompt(attempt_id, connection, spec(tokens, BLOCK))


def numbers(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def spans(chunks: list[Chunk]) -> list[tuple[int, int, int]]:
    return [(chunk.prompt.attempt_id, chunk.start, chunk.end) for chunk in chunks]


def test_short_prompts_share_a_batch_and_a_long_one_is_cut() -> None:
    scheduler = Scheduler(BlockPool(100), BLOCK, max_batch_tokens=16)
    scheduler.add(prompt(1, numbers(5)))
    scheduler.add(prompt(2, numbers(30, 100)))
    scheduler.add(prompt(3, numbers(4, 200)))
    assert spans(scheduler.schedule()) == [(1, 0, 5), (2, 0, 11)]
    assert spans(scheduler.schedule()) == [(2, 11, 27)]
    assert spans(scheduler.schedule()) == [(2, 27, 30), (3, 0, 4)]
    assert scheduler.schedule() == []


def test_a_batch_holds_so_many_chunks_and_no_more() -> None:
    scheduler = Scheduler(BlockPool(1_000), BLOCK, max_batch_tokens=80)
    for attempt_id in range(25):
        scheduler.add(prompt(attempt_id, numbers(3, 100 * attempt_id)))
    assert [len(scheduler.schedule()) for _ in range(4)] == [10, 10, 5, 0]


def test_cached_blocks_are_not_computed_again_but_the_last_token_is() -> None:
    pool = BlockPool(100)
    scheduler = Scheduler(pool, BLOCK, max_batch_tokens=64)
    scheduler.add(prompt(1, numbers(8)))
    (chunk,) = scheduler.schedule()
    assert scheduler.finish(chunk)
    scheduler.add(prompt(2, numbers(8)))
    scheduler.add(prompt(3, [*numbers(8), 50, 51]))
    assert spans(scheduler.schedule()) == [(2, 4, 8), (3, 8, 10)]


def test_a_prompt_waits_for_a_prefix_that_is_being_computed() -> None:
    pool = BlockPool(100)
    scheduler = Scheduler(pool, BLOCK, max_batch_tokens=64)
    shared = numbers(12)
    for attempt_id in range(3):
        scheduler.add(prompt(attempt_id, [*shared, 90 + attempt_id]))
    scheduler.add(prompt(7, numbers(6, 500)))
    first = scheduler.schedule()
    assert spans(first) == [(0, 0, 13), (7, 0, 6)]
    assert scheduler.schedule() == []
    for chunk in first:
        scheduler.finish(chunk)
    assert spans(scheduler.schedule()) == [(1, 12, 13), (2, 12, 13)]


def test_a_prompt_goes_on_by_itself_where_its_prefix_ends() -> None:
    scheduler = Scheduler(BlockPool(100), BLOCK, max_batch_tokens=8)
    scheduler.add(prompt(1, numbers(40)))
    scheduler.add(prompt(2, [*numbers(8), *numbers(4, 500)]))
    scheduler.add(prompt(3, [*numbers(24), *numbers(4, 600)]))
    batches = []
    for _ in range(6):
        chunks = scheduler.schedule()
        for chunk in chunks:
            scheduler.finish(chunk)
        batches.append(spans(chunks))
    assert batches == [
        [(1, 0, 8)],
        [(1, 8, 16)],
        [(1, 16, 24)],
        [(1, 24, 32)],
        [(1, 32, 40)],
        [(2, 8, 12), (3, 24, 28)],
    ]


class CountingPool(BlockPool):
    looked_up = 0

    def finds(self, block_hash: bytes) -> bool:
        self.looked_up += 1
        return super().finds(block_hash)


def test_prompts_that_wait_for_a_prefix_do_not_look_up_what_is_before_it_again_and_again() -> None:
    pool = CountingPool(2_000)
    scheduler = Scheduler(pool, BLOCK, max_batch_tokens=8)
    context = numbers(4_000)
    scheduler.add(prompt(0, context))
    while chunks := scheduler.schedule():
        scheduler.finish(chunks[0])
    for attempt_id in range(1, 21):
        scheduler.add(prompt(attempt_id, [*context, *numbers(80, 5_000), attempt_id]))
    batches = 0
    while scheduler.waiting_count:
        for chunk in scheduler.schedule():
            scheduler.finish(chunk)
        batches += 1
    assert batches > 10
    assert pool.looked_up <= 20 * (1_000 + 20 + batches)


def test_a_prefix_is_computed_by_the_next_when_its_prompt_is_dropped() -> None:
    pool = BlockPool(100)
    scheduler = Scheduler(pool, BLOCK, max_batch_tokens=8)
    scheduler.add(prompt(1, numbers(20)))
    scheduler.add(prompt(2, numbers(20)))
    (chunk,) = scheduler.schedule()
    scheduler.drop(1)
    assert pool.in_use_count == 5, "a chunk that is being computed still writes to its blocks"
    assert not scheduler.finish(chunk)
    assert pool.in_use_count == 0
    assert spans(scheduler.schedule()) == [(2, 8, 16)], "the finished chunk of the dropped prompt stays useful"


def test_the_head_of_the_queue_waits_for_blocks_and_nobody_overtakes_it() -> None:
    pool = BlockPool(6)
    scheduler = Scheduler(pool, BLOCK, max_batch_tokens=64)
    scheduler.add(prompt(1, numbers(16)))
    (chunk,) = scheduler.schedule()
    scheduler.finish(chunk)
    scheduler.add(prompt(2, numbers(12, 100)))
    scheduler.add(prompt(3, numbers(4, 200)))
    assert scheduler.schedule() == []
    pool.release(chunk.prompt.blocks)
    assert spans(scheduler.schedule()) == [(2, 0, 12), (3, 0, 4)]


def reserved(pool: BlockPool, attempt_id: int, tokens: list[int]) -> Prompt:
    """As a decode worker that prefills sends it: with its blocks."""
    made = prompt(attempt_id, tokens)
    hits = pool.match(made.spec.hashes_before_last_token(BLOCK))
    made.blocks = hits + pool.allocate(-(-len(tokens) // BLOCK) - len(hits))
    return made


def test_blocks_that_come_with_a_prompt_are_used() -> None:
    pool = BlockPool(5)
    scheduler = Scheduler(pool, BLOCK, max_batch_tokens=64)
    made = reserved(pool, 1, numbers(18))
    blocks = list(made.blocks)
    scheduler.add(made)
    assert spans(scheduler.schedule()) == [(1, 0, 18)], "no block is free, and none is needed"
    assert made.blocks == blocks


def test_reserved_blocks_whose_content_the_cache_has_got_meanwhile_are_given_back() -> None:
    pool = BlockPool(20)
    scheduler = Scheduler(pool, BLOCK, max_batch_tokens=64)
    first, second = (reserved(pool, attempt_id, [*numbers(12), 90 + attempt_id]) for attempt_id in (1, 2))
    scheduler.add(first)
    scheduler.add(second)
    (chunk,) = scheduler.schedule()
    assert pool.in_use_count == 8
    assert scheduler.finish(chunk)
    assert spans(scheduler.schedule()) == [(2, 12, 13)]
    assert second.blocks[:3] == first.blocks[:3]
    assert pool.in_use_count == 5
    pool.release(first.blocks)
    scheduler.drop(2)
    assert pool.in_use_count == 4, "a chunk is under way"


def test_a_dropped_prompt_gives_back_its_reserved_blocks() -> None:
    pool = BlockPool(20)
    scheduler = Scheduler(pool, BLOCK, max_batch_tokens=8)
    for attempt_id in (1, 2):
        scheduler.add(reserved(pool, attempt_id, numbers(10, 100 * attempt_id)))
    (chunk,) = scheduler.schedule()
    scheduler.drop(2)  # it waits
    assert pool.in_use_count == 3
    scheduler.finish(chunk)
    scheduler.drop(1)  # between two chunks
    assert pool.in_use_count == 0


def test_random_arrivals_and_drops_leave_nothing_behind() -> None:
    random_ = random.Random(7)
    pool = BlockPool(64)
    scheduler = Scheduler(pool, BLOCK, max_batch_tokens=24)
    leases = Leases(pool, seconds=10)
    in_flight: list[list[Chunk]] = []
    for turn in range(2_000):
        if turn < 1_500 and random_.random() < 0.5:
            shared = numbers(random_.choice((0, 8, 16)))
            tokens = [*shared, *(random_.randrange(1_000, 2_000) for _ in range(random_.randrange(1, 60)))]
            scheduler.add(prompt(turn, tokens, connection=turn % 2))
        if random_.random() < 0.3:
            attempt_id = random_.randrange(max(turn - 20, 0), turn + 1)
            scheduler.drop(attempt_id)
            leases.end(attempt_id)
        if turn % 500 == 499:
            scheduler.drop_connection(1)
            leases.end_connection(1)
        if chunks := scheduler.schedule():
            assert sum(chunk.end - chunk.start for chunk in chunks) <= 24
            in_flight.append(chunks)
        if in_flight and (len(in_flight) > 1 or not chunks):
            for chunk in in_flight.pop(0):
                if scheduler.finish(chunk):
                    leases.grant(chunk.prompt, now=turn)
        leases.expire(now=turn)
    assert scheduler.waiting_count == scheduler.running_count == len(leases) == 0
    assert pool.in_use_count == 0
    assert pool.cached_count > 0


# ------------------------------------------------------------ with host memory


class Arriving:
    """Copies that have arrived once `now` is true."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.now = True
        self.loaded: list[int] = []  # blocks of the pool

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> "Arriving":
        return self

    def load(self, slots: Sequence[int], blocks: Sequence[int]) -> "Arriving":
        self.loaded += blocks
        return self

    def done(self) -> bool:
        return self.now

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class WithHost:
    pool: BlockPool
    memory: Arriving
    cache: HostCache
    scheduler: Scheduler

    def run(self, *asked: Prompt) -> list[list[tuple[int, int, int]]]:
        """Computes all that can be computed now, and lets go of it. Returns the batches."""
        for one in asked:
            self.scheduler.add(one)
        batches = []
        while (chunks := self.scheduler.schedule()) or (self.scheduler.waits_for_load and self.memory.now):
            for chunk in chunks:
                if self.scheduler.finish(chunk):
                    self.pool.release(chunk.prompt.blocks)
            batches += [spans(chunks)] if chunks else []
            self.cache.turn()
            self.cache.turn()
        return batches


def with_host(blocks: int, slots: int = 100, max_batch_tokens: int = 64) -> WithHost:
    pool, memory = BlockPool(blocks), Arriving(slots)
    cache = HostCache(pool, memory)
    return WithHost(pool, memory, cache, Scheduler(pool, BLOCK, max_batch_tokens, cache))


def test_blocks_that_were_evicted_are_loaded_and_not_computed() -> None:
    one = with_host(blocks=6)
    one.run(prompt(1, numbers(20)), prompt(2, numbers(24, 100)))
    assert not one.pool.finds(spec(numbers(20), BLOCK).block_hashes[0])
    again = prompt(3, numbers(20))
    one.memory.now = False
    assert (one.run(again), one.scheduler.waits_for_load) == ([], True)
    one.memory.now = True
    assert one.run() == [[(3, 16, 20)]], "the last token is computed, and its block with it"
    assert (again.cached_len, again.loaded_len) == (16, 16)
    assert one.memory.loaded == again.blocks[:4]
    assert (one.pool.in_use_count, one.cache.slots.in_use_count) == (0, 0)


def test_only_what_the_pool_lacks_is_loaded() -> None:
    one = with_host(blocks=9)
    one.run(prompt(1, numbers(20)))
    one.run(prompt(2, numbers(28, 100)))  # evicts the last three blocks of the first
    again = prompt(3, numbers(20))
    assert one.run(again) == [[(3, 16, 20)]]
    assert (again.cached_len, again.loaded_len) == (16, 8)
    assert one.memory.loaded == again.blocks[2:4]


def test_what_prompts_use_again_is_the_last_to_go_from_host_memory() -> None:
    one = with_host(blocks=40, slots=10)
    one.run(prompt(1, numbers(17)))
    one.run(prompt(2, numbers(17, 100)))
    one.run(prompt(3, numbers(17)))  # finds all in the pool
    one.run(prompt(4, numbers(17, 200)))
    kept = [[one.cache.finds(name) for name in spec(numbers(17, start), BLOCK).block_hashes] for start in (0, 100)]
    assert kept == [[True] * 4, [True, True, False, False]]


def test_others_run_while_one_loads_and_a_prompt_with_the_same_prefix_waits_for_it() -> None:
    one = with_host(blocks=15)
    one.run(prompt(1, numbers(20)))
    one.run(prompt(2, numbers(60, 100)))
    one.memory.now = False
    assert one.run(prompt(3, numbers(20)), prompt(4, [*numbers(20), 90]), prompt(5, numbers(8, 500))) == [[(5, 0, 8)]]
    one.memory.now = True
    assert one.run() == [[(3, 16, 20)], [(4, 20, 21)]]
    assert len(one.memory.loaded) == 4


def test_a_prompt_that_is_dropped_while_it_loads_keeps_its_blocks_until_that_is_over() -> None:
    one = with_host(blocks=6)
    one.run(prompt(1, numbers(20)))
    one.run(prompt(2, numbers(20, 100)))
    one.memory.now = False
    one.run(prompt(3, numbers(20)))
    one.scheduler.drop(3)
    assert one.scheduler.has(3)
    assert one.pool.in_use_count == 5
    one.run(prompt(4, numbers(20, 200)))
    assert one.scheduler.waiting_count == 1
    one.memory.now = True
    assert one.run() == [[(4, 0, 20)]]
    assert (one.pool.in_use_count, one.cache.slots.in_use_count, one.scheduler.running_count) == (0, 0, 0)
