"""What the router believes about a worker's cache is what is so."""

from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from common.kv.block_pool import BlockPool
from common.worker.cache_report import CacheReport
from router.cluster.prefix_index import PrefixIndex
from twostroke.v1 import worker_pb2


@dataclass
class Wire:
    """In place of a worker's service: messages go straight into the index of each router."""

    routers: dict[int, PrefixIndex] = field(default_factory=dict)
    messages: dict[int, worker_pb2.WorkerMessage] = field(default_factory=dict)
    snapshots: int = 0
    changes: int = 0

    @property
    def connections(self) -> tuple[int, ...]:
        return tuple(self.routers)

    def outgoing(self, connection: int) -> worker_pb2.WorkerMessage:
        return self.messages.setdefault(connection, worker_pb2.WorkerMessage())

    def flush(self) -> None:
        for connection, message in self.messages.items():
            received = worker_pb2.WorkerMessage.FromString(message.SerializeToString())
            self.routers[connection].apply(received.cache)
            self.routers[connection].apply_host(received.host_cache)
            self.snapshots += received.cache.snapshot
            self.changes += not received.cache.snapshot
        self.messages.clear()


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("host_blocks", [0, 30])
def test_every_routers_index_is_the_pool_after_whatever_happened(seed: int, host_blocks: int) -> None:
    """And knows what is in host memory."""
    random = Random(seed)
    pool, wire = BlockPool(24), Wire()
    pools = [pool] + ([BlockPool(host_blocks)] if host_blocks else [])
    service: Any = wire
    report = CacheReport(service, *pools)
    held: list[list[int]] = []
    for turn in range(300):
        for _ in range(random.choice((1, 1, 2, 40))):  # many in one turn are more than the pool keeps a record of
            chain = [name(random.randrange(12) * 100 + place) for place in range(random.randrange(8))]
            blocks = pool.match(chain)
            if (wanted := len(chain) - len(blocks)) <= pool.available:
                blocks += pool.allocate(wanted)
                for block, hash in zip(blocks, chain, strict=True):
                    pool.publish(block, hash)
            held.append(blocks)
            while held and (len(held) > 3 or random.random() < 0.4):
                pool.release(held.pop(random.randrange(len(held))))
        for host in pools[1:]:
            copied = random.sample(sorted(pool.hashes()), min(3, len([*pool.hashes()])))
            slots = host.allocate(len(copied))
            for slot, hash in zip(slots, copied, strict=True):
                host.publish(slot, hash)
            host.release(slots)
        if random.random() < 0.03:
            wire.routers[turn] = PrefixIndex()
        if wire.routers and random.random() < 0.01:
            del wire.routers[random.choice(list(wire.routers))]
        report.send()
        wire.flush()
        for index in wire.routers.values():
            known = [index.published, index.in_host_memory][: len(pools)]
            assert known == [set(pool.hashes()) for pool in pools]
    assert wire.snapshots > 0
    assert wire.changes > wire.snapshots


def test_what_is_in_host_memory_needs_no_computing_but_takes_room() -> None:
    """And a sequence whose prompt another worker computes gets nothing from there."""
    index = PrefixIndex()
    chain = [name(number) for number in range(6)]
    index.apply(worker_pb2.CacheChanges(published=chain[0]))
    index.apply_host(worker_pb2.CacheChanges(published=b"".join(chain[:4])))
    index.begin(chain, computed_here=False)
    index.end(chain[4:], computed_here=False)
    assert index.computed(chain) == 4
    assert index.shared(chain) == 1
    assert index.may_have_computed(chain[3])
    assert not index.may_share(chain[3])
    index.end(chain[:4], computed_here=False)
    assert (index.hits(chain, computed_here=False), index.hits(chain, computed_here=True)) == (1, 4)


def test_a_turn_without_news_sends_nothing() -> None:
    pool, wire = BlockPool(4), Wire({0: PrefixIndex()})
    service: Any = wire
    report = CacheReport(service, pool)
    report.send()
    wire.flush()
    report.send()
    assert not wire.messages


def test_what_is_under_way_counts_as_found_until_it_ends() -> None:
    index = PrefixIndex()
    chain = [name(number) for number in range(4)]
    index.begin(chain[:3], computed_here=False)
    index.begin(chain[:2], computed_here=True)
    assert index.hits(chain, computed_here=False) == 3
    assert index.computed(chain) == 2
    assert index.shared(chain) == 0
    index.apply(worker_pb2.CacheChanges(published=b"".join(chain[:3])))
    assert index.shared(chain) == index.computed(chain) == 3
    index.end(chain[:3], computed_here=False)
    assert (index.hits(chain, computed_here=False), index.shared(chain)) == (3, 2)
    index.end(chain[:2], computed_here=True)
    index.apply(worker_pb2.CacheChanges(dropped=chain[1]))
    assert (index.hits(chain, computed_here=False), index.computed(chain), index.shared(chain)) == (1, 1, 0)


def test_what_is_counted_is_what_a_walk_along_the_chain_finds() -> None:
    random = Random(7)
    chain = [name(number) for number in range(6)]
    for _ in range(500):
        index = PrefixIndex()
        published, here, elsewhere = (random.sample(chain, random.randrange(7)) for _ in range(3))
        index.apply(worker_pb2.CacheChanges(published=b"".join(published)))
        index.begin(here, computed_here=True)
        index.begin(elsewhere, computed_here=False)
        under_way = {*here, *elsewhere}
        assert index.hits(chain, computed_here=False) == walk(chain, {*published, *under_way})
        assert index.computed(chain) == walk(chain, {*published, *here})
        assert index.shared(chain) == walk(chain, {*published} & under_way)


def walk(chain: list[bytes], found: set[bytes]) -> int:
    for count, hash in enumerate(chain):
        if hash not in found:
            return count
    return len(chain)
