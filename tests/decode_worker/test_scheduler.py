"""The decode worker's sequences: reservation, growth, preemption, and blocks that come home."""

import random
from collections import Counter

import pytest

from common.kv.block_pool import BlockPool
from common.kv.prefix_hash import block_hashes
from decode_worker.scheduler import Scheduler, Sequence, State
from tests.specs import ROOT, spec

BLOCK = 4


def sequence(attempt_id: int, length: int, max_length: int = 100, start: int = 0, connection: int = 0) -> Sequence:
    tokens = list(range(start, start + length))
    return Sequence(attempt_id, connection, spec(tokens, BLOCK, max_length), tokens)


def start(scheduler: Scheduler, seq: Sequence, first_token: int = 7) -> None:
    seq.tokens.append(first_token)
    scheduler.start(seq)


def step(scheduler: Scheduler, seq: Sequence, token: int = 7) -> None:
    assert not scheduler.grow([seq])
    seq.kv_len += 1
    scheduler.deliver(seq, token)


def test_room_is_prompt_and_headroom_and_promises_count() -> None:
    pool = BlockPool(10)
    scheduler = Scheduler(pool, BLOCK, max_batch=8)
    assert scheduler.reserve(sequence(1, 9), headroom_tokens=8)  # 3 blocks, and 2 promised
    assert (pool.in_use_count, scheduler.promised) == (3, 2)
    assert not scheduler.reserve(sequence(2, 20, start=100), headroom_tokens=4)
    assert (pool.in_use_count, scheduler.promised) == (3, 2), "a refusal takes nothing"
    assert scheduler.reserve(sequence(3, 16, start=100), headroom_tokens=4)
    assert (pool.in_use_count, scheduler.promised) == (7, 3)


def test_the_batch_has_a_limit() -> None:
    scheduler = Scheduler(BlockPool(10), BLOCK, max_batch=1)
    assert scheduler.reserve(sequence(1, 1), 0)
    assert not scheduler.reserve(sequence(2, 1), 0)


def test_what_is_kept_for_another_is_left_with_a_place_in_the_batch() -> None:
    pool = BlockPool(10)
    scheduler = Scheduler(pool, BLOCK, max_batch=3)
    assert not scheduler.reserve(sequence(1, 16), headroom_tokens=4, kept_blocks=6)
    assert scheduler.reserve(sequence(1, 16), headroom_tokens=0, kept_blocks=6)
    assert scheduler.reserve(sequence(2, 1, start=100), 0, kept_blocks=5)
    assert not scheduler.reserve(sequence(3, 1, start=200), 0, kept_blocks=1)
    assert scheduler.reserve(sequence(3, 1, start=200), 0)
    assert pool.in_use_count == 6


def test_no_more_is_promised_than_the_sequence_can_use() -> None:
    scheduler = Scheduler(BlockPool(10), BLOCK, max_batch=8)
    seq = sequence(1, 4, max_length=9)
    assert scheduler.reserve(seq, headroom_tokens=1_000)
    assert scheduler.promised == 1, "of 9 tokens the last is never run: two blocks hold the rest"


def test_growth_uses_the_promise_first_and_starves_at_others_promises() -> None:
    pool = BlockPool(4)
    scheduler = Scheduler(pool, BLOCK, max_batch=8)
    promised, other = sequence(1, 4), sequence(2, 4, start=50)
    assert scheduler.reserve(promised, headroom_tokens=4)
    assert scheduler.reserve(other, headroom_tokens=0)
    start(scheduler, promised)
    start(scheduler, other)
    assert scheduler.grow([other]) == []
    other.kv_len = 8
    assert scheduler.grow([other]) == [other], "the block that is left is promised"
    assert scheduler.grow([promised]) == []
    assert pool.in_use_count == 4
    assert scheduler.cheapest() is other, "the first has not made the tokens yet that it reserved room for"
    scheduler.end(promised)
    assert scheduler.grow([other]) == []


def test_a_sequence_with_a_promise_is_preempted_last() -> None:
    scheduler = Scheduler(BlockPool(20), BLOCK, max_batch=8)
    short, long = sequence(1, 4), sequence(2, 12, start=50)
    assert scheduler.reserve(short, headroom_tokens=8)
    assert scheduler.reserve(long, headroom_tokens=0)
    start(scheduler, short)
    start(scheduler, long)
    assert scheduler.cheapest() is long


@pytest.mark.parametrize("drafts", [0, 4, 15])
@pytest.mark.parametrize("block", [1, 16])
def test_a_sequence_is_safe_for_as_many_tokens_as_it_reserved_room_for(block: int, drafts: int) -> None:
    """However many blocks it took for drafts, none of which was right."""
    scheduler = Scheduler(BlockPool(200), block, max_batch=8)
    seq, other = (
        Sequence(attempt, 0, spec(range(99 * attempt, 99 * attempt + 20), block), list(range(20))) for attempt in (1, 2)
    )
    assert scheduler.reserve(seq, headroom_tokens=32)
    assert scheduler.reserve(other, headroom_tokens=0)
    start(scheduler, seq)
    start(scheduler, other)
    other.tokens += range(50)
    for made in range(1, 40):
        assert scheduler.cheapest() is (other if made <= 32 else seq)
        assert not scheduler.grow([seq], drafts)
        seq.kv_len += 1
        scheduler.deliver(seq, 7)


@pytest.mark.parametrize("blocks", range(6, 30))
def test_drafts_preempt_nothing(blocks: int) -> None:
    """A step that lacks a block gets what was taken for drafts, before anything is preempted."""

    def steps_until_starved(drafts: int) -> int | None:
        pool = BlockPool(blocks)
        scheduler = Scheduler(pool, BLOCK, max_batch=8)
        running = [sequence(1, 8, 40), sequence(2, 12, 20, start=50), sequence(3, 8, 24, start=100)]
        if not all(scheduler.reserve(seq, headroom_tokens=6) for seq in running):
            return None
        for seq in running:
            start(scheduler, seq)
        for made in range(100):
            if starved := scheduler.grow(running, drafts):
                scheduler.give_back_drafts_blocks(running)
                if scheduler.grow(starved):
                    return made
            for seq in list(running):
                seq.kv_len += 1
                scheduler.deliver(seq, 7)
                if not seq.wants_step:
                    running.remove(seq)
                    scheduler.end(seq)
            scheduler.give_back_drafts_blocks(running if made % 3 else [])
            assert scheduler.promised == sum(seq.promised for seq in running)
            assert pool.in_use_count == sum(len(seq.blocks) for seq in running)
        assert (pool.in_use_count, scheduler.promised) == (0, 0)
        return None

    assert steps_until_starved(8) == steps_until_starved(0)


def test_filled_blocks_are_found_by_the_next_turn() -> None:
    pool = BlockPool(20)
    scheduler = Scheduler(pool, BLOCK, max_batch=8)
    seq = sequence(1, 6)
    assert scheduler.reserve(seq, headroom_tokens=8)
    start(scheduler, seq, first_token=100)
    for token in (101, 102, 103, 104, 105):
        step(scheduler, seq, token)
    hashes = block_hashes(ROOT, [*range(6), *range(100, 106)], BLOCK)
    assert [*map(pool.finds, hashes)] == [True, True, False], "the third block lacks the KV of its last token"
    step(scheduler, seq, 106)
    assert all(map(pool.finds, hashes))
    scheduler.end(seq)
    again = Sequence(2, 0, spec([*range(6), *range(100, 110)], BLOCK), [*range(6), *range(100, 110)])
    assert scheduler.reserve(again, headroom_tokens=0)
    assert again.cached_blocks == 3


def test_nothing_is_found_before_it_was_pulled() -> None:
    pool = BlockPool(20)
    scheduler = Scheduler(pool, BLOCK, max_batch=8)
    seq = sequence(1, 8)
    assert scheduler.reserve(seq, headroom_tokens=0)
    assert not any(map(pool.finds, seq.spec.block_hashes))
    scheduler.end(seq)
    assert pool.free_count == 20


def test_a_prompt_to_be_computed_here_shares_all_blocks_but_the_one_of_its_last_token() -> None:
    """Its KV is written: in a block that others have found it would be written under their feet."""
    pool = BlockPool(20)
    scheduler = Scheduler(pool, BLOCK, max_batch=8)
    first = sequence(1, 8)
    assert scheduler.reserve(first, headroom_tokens=0)
    start(scheduler, first)
    pulled, computed = sequence(2, 8), sequence(3, 8)
    computed.state = State.PREFILLING
    for seq, shared in ((pulled, 2), (computed, 1)):
        assert scheduler.reserve(seq, headroom_tokens=0)
        assert seq.blocks[:shared] == first.blocks[:shared]
        assert seq.cached_blocks == shared
    assert pool.in_use_count == 3


def test_blocks_stay_until_the_last_launched_step_is_through() -> None:
    pool = BlockPool(20)
    scheduler = Scheduler(pool, BLOCK, max_batch=8)
    seq = sequence(1, 8)
    assert scheduler.reserve(seq, headroom_tokens=0)
    start(scheduler, seq)
    seq.writes_in_flight = 1
    scheduler.end(seq)
    scheduler.end(seq)
    assert pool.in_use_count == 2
    assert scheduler.count == 0
    seq.writes_in_flight = 0
    scheduler.release_if_idle(seq)
    scheduler.release_if_idle(seq)
    assert pool.in_use_count == 0


def test_scarce_blocks_and_random_ends_leave_nothing_behind_and_everyone_gets_through() -> None:
    random_ = random.Random(3)
    pool = BlockPool(24)
    scheduler = Scheduler(pool, BLOCK, max_batch=6)
    waiting = [sequence(i, random_.randrange(1, 30), start=1_000 * i, max_length=60) for i in range(60)]
    preemptions: Counter[int] = Counter()
    running: list[Sequence] = []
    done = 0
    for _ in range(20_000):
        if waiting and scheduler.reserve(waiting[-1], headroom_tokens=4 << preemptions[waiting[-1].attempt_id]):
            seq = waiting.pop()
            start(scheduler, seq)
            running.append(seq)
        starved = scheduler.grow(running)
        while starved := scheduler.grow([seq for seq in starved if seq in running]):
            victim = scheduler.cheapest()
            scheduler.end(victim)
            running.remove(victim)
            preemptions[victim.attempt_id] += 1
            tokens = victim.tokens
            waiting.append(Sequence(victim.attempt_id, 0, spec(tokens, BLOCK, 60), list(tokens)))
        for seq in list(running):
            if seq.wants_step:
                seq.kv_len += 1
                scheduler.deliver(seq, random_.randrange(100))
            if not seq.wants_step or random_.random() < 0.01:
                scheduler.end(seq)
                running.remove(seq)
                done += 1
    assert done == 60
    assert 1 < max(preemptions.values()) <= 4  # then 64 tokens are promised, and none has more
    assert (pool.in_use_count, scheduler.promised, scheduler.count) == (0, 0, 0)
