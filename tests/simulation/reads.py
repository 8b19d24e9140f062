"""Reads of KV from other workers' pools: block by block, in any order, while the pools go on changing."""

import random
from collections.abc import Sequence

import torch

from common.kv.kv_pool import KvLayout, KvPool
from common.transport import PeerPool, TransferFailed, TransportError
from tests.simulation.host import Host


class Pools:
    """The pools of all workers that there ever were. A dead one's can still be read for a while.

    Args:
        failing: share of reads that fail. Fewer pools can't be opened, as routers ask again only after seconds.
        rng: decides which.
    """

    def __init__(self, failing: float, rng: random.Random) -> None:
        self.failing = failing
        self.rng = rng
        self.under_way: list[_Read] = []
        self._owners: dict[bytes, Host] = {}  # by descriptor

    def add(self, owner: Host) -> None:
        self._owners[owner.parts.hello.pool.descriptor] = owner

    def open(self, descriptor: bytes, _transport: str, _layout: KvLayout, _device: torch.device) -> PeerPool:
        """As `common.transport.open_peer`."""
        owner = self._owners[descriptor]
        if owner.dead or self.rng.random() < self.failing / 4:
            raise TransportError("it cannot be opened")
        return _Peer(self, owner)

    def go_on(self) -> None:
        self.under_way = [read for read in self.under_way if read.left]
        for read in self.under_way:
            read.copy_some()


class _Peer:
    """A `PeerPool`."""

    bytes_per_second = 1.0

    def __init__(self, pools: Pools, owner: Host) -> None:
        self._pools = pools
        self._owner = owner
        self._closed = False

    def read(self, src_blocks: Sequence[int], dst: KvPool, dst_blocks: Sequence[int]) -> "_Read":
        assert not self._closed
        pools = self._pools
        if pools.rng.random() < pools.failing:
            raise TransferFailed("it cannot be read")
        pairs = list(zip(src_blocks, dst_blocks, strict=True))
        pools.rng.shuffle(pairs)
        pools.under_way.append(read := _Read(self._owner, dst, pairs, pools.rng))
        return read

    def generations_hold(self, blocks: Sequence[int], expected: Sequence[int]) -> bool:
        assert not self._closed
        return [self._owner.parts.blocks.generation(block) for block in blocks] == list(expected)

    def owner_alive(self) -> bool:
        return not self._owner.dead

    def close(self) -> None:
        self._closed = True


class _Read:
    """A `Transfer`."""

    milliseconds = 1.0

    def __init__(self, owner: Host, target: KvPool, left: list[tuple[int, int]], rng: random.Random) -> None:
        self.left = left  # blocks there and here
        self._owner = owner
        self._target = target
        self._rng = rng

    def copy_some(self) -> None:
        for _ in range(min(self._rng.randrange(4), len(self.left))):
            there, here = self.left.pop()
            self._target.tensor[here] = self._owner.parts.pool.tensor[there]

    def done(self) -> bool:
        if self._owner.dead and self._rng.random() < 0.3:
            self.left = []
            raise TransferFailed("its owner is gone")
        return not self.left and self._rng.random() < 0.6

    def wait(self) -> None:
        raise NotImplementedError  # engines ask whether it is done
