"""The memory of a `HostCache`: its size, and copies to and from it beside a CPU."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import structlog

from common.kv import block_rows
from common.kv.host_cache import HostMemory
from common.kv.host_room import HostMemoryError
from common.kv.kv_pool import KvPool

log = structlog.get_logger(__name__)


def blocks_in(gib: float, block_bytes: int) -> int:
    """How many blocks fit `gib` GiB of the host's memory.

    Raises:
        HostMemoryError: not a single one does.
    """
    num_blocks = int(gib * 2**30) // block_bytes
    if not num_blocks:
        raise HostMemoryError(f"--host-cache-gib {gib:g} is less than one KV block, which has {block_bytes} bytes")
    return num_blocks


def allocate(pool: KvPool, num_blocks: int) -> HostMemory:
    """Memory of the host for `num_blocks` blocks of `pool`.

    Raises:
        HostMemoryError: it is beside a GPU, and CUDA does not lock so much.
    """
    log.info("KV is kept in host memory, too", mib=num_blocks * pool.layout.block_bytes >> 20, blocks=num_blocks)
    if pool.tensor.device.type == "cpu":
        return PlainMemory(pool, num_blocks)
    from common.kv.pinned_memory import PinnedMemory  # needs cupy

    return PinnedMemory(pool, num_blocks)


class PlainMemory:
    """Beside a pool that is itself in the host's memory; threads copy. See host_cache.HostMemory."""

    def __init__(self, pool: KvPool, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._pool = block_rows.of_pool(pool)
        self._host = np.empty((num_blocks, pool.layout.block_bytes), np.uint8)
        self._host.fill(0)  # takes the memory now: where it is missing, the kernel would end this process later
        # Apart, so that a prompt does not wait for what others have published.
        self._saver, self._loader = (ThreadPoolExecutor(1, thread_name_prefix="host-cache") for _ in range(2))

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> "ThreadCopy":
        return ThreadCopy(self._saver.submit(block_rows.copy, self._pool, tuple(blocks), self._host, tuple(slots)))

    def load(self, slots: Sequence[int], blocks: Sequence[int]) -> "ThreadCopy":
        return ThreadCopy(self._loader.submit(block_rows.copy, self._host, tuple(slots), self._pool, tuple(blocks)))

    def close(self) -> None:
        self._saver.shutdown()
        self._loader.shutdown()


class ThreadCopy:
    def __init__(self, work: Future[None]) -> None:
        self._work = work

    def done(self) -> bool:
        if not self._work.done():
            return False
        self._work.result()
        return True
