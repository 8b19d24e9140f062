"""Memories of hosts: blocks are copied to and from them one by one, in any order, while the pools go on changing."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from common.kv.kv_pool import KvPool


class HostMemories:
    """
    Args:
        rng: decides what is copied when.

    Attributes:
        loads: copies into pools so far.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.under_way: list[_Copy] = []
        self.loads = 0

    def beside(self, pool: KvPool, num_blocks: int) -> "SlowMemory":
        return SlowMemory(self, pool, num_blocks)

    def begin(self, source: Tensor, src_blocks: Sequence[int], target: Tensor, dst_blocks: Sequence[int]) -> "_Copy":
        pairs = list(zip(src_blocks, dst_blocks, strict=True))
        self.rng.shuffle(pairs)
        self.under_way.append(copy := _Copy(source, target, pairs))
        return copy

    def go_on(self) -> None:
        self.under_way = [copy for copy in self.under_way if copy.left]
        for copy in self.under_way:
            copy.copy_some(self.rng.randrange(4))


class SlowMemory:
    """A `HostMemory`."""

    def __init__(self, memories: HostMemories, pool: KvPool, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.tensor = torch.zeros((num_blocks, *pool.tensor.shape[1:]), dtype=pool.tensor.dtype)
        self._memories = memories
        self._pool = pool.tensor

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> "_Copy":
        return self._memories.begin(self._pool, blocks, self.tensor, slots)

    def load(self, slots: Sequence[int], blocks: Sequence[int]) -> "_Copy":
        self._memories.loads += 1
        return self._memories.begin(self.tensor, slots, self._pool, blocks)

    def close(self) -> None:
        pass


class _Copy:
    def __init__(self, source: Tensor, target: Tensor, left: list[tuple[int, int]]) -> None:
        self.left = left
        self._source = source
        self._target = target

    def copy_some(self, count: int) -> None:
        for _ in range(min(count, len(self.left))):
            source, target = self.left.pop()
            self._target[target] = self._source[source]

    def done(self) -> bool:
        return not self.left
