"""Transport for CPUs of one host: the pool is a file in /dev/shm; a reader maps it and copies blocks on a thread."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import structlog
import torch
from torch import Tensor

from common.kv import block_rows
from common.kv.block_rows import Rows
from common.kv.kv_pool import KvLayout, KvPool
from common.transport.checks import PROBE_BYTES, check_blocks, check_probe, new_probe
from common.transport.interface import TransferFailed, TransportError
from common.transport.segment import OwnSegment, PeerSegment
from common.transport.thread_transfer import ThreadTransfer

log = structlog.get_logger(__name__)

_MEASURED_BYTES = 16 << 20


class ShmMemory:
    """The owner's pool: the body of its segment. See interface.PoolMemory."""

    def __init__(self, layout: KvLayout, instance: str) -> None:
        self._segment = OwnSegment(instance, layout, layout.pool_bytes + PROBE_BYTES)
        body = torch.frombuffer(self._segment.body, dtype=torch.uint8)
        self.tensor: Tensor = body[: layout.pool_bytes]
        probe, digest = new_probe()
        self._segment.body[layout.pool_bytes :] = probe
        self._segment.publish(digest)
        self.generations = self._segment.generations
        self.descriptor = self._segment.descriptor()

    def close(self) -> None:
        self._segment.close()


class ShmPeer:
    """A peer's pool, mapped read-only. See interface.PeerPool."""

    def __init__(self, descriptor: bytes, layout: KvLayout) -> None:
        self._segment = PeerSegment(descriptor, layout)
        theirs = self._segment.header.layout
        self._block_bytes = theirs.block_bytes
        self._rows: Rows | None = np.frombuffer(self._segment.body, np.uint8, theirs.pool_bytes).reshape(
            theirs.num_blocks, theirs.block_bytes
        )
        self._copier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shm-copy")
        try:
            check_probe(self._read_probe(), self._segment.header.probe_digest, self._segment.header.instance)
        except TransportError:
            self.close()
            raise
        self.bytes_per_second = self._measure()
        log.info(
            "opened a peer's pool",
            transport="shm",
            instance=self._segment.header.instance,
            probe="intact",
            gigabytes_per_second=round(self.bytes_per_second / 1e9, 2),
        )

    def _read_probe(self) -> bytes:
        pool_bytes = self._segment.header.layout.pool_bytes
        probe = np.frombuffer(self._segment.body, np.uint8, PROBE_BYTES, pool_bytes).reshape(1, PROBE_BYTES)
        received = np.zeros_like(probe)
        self._copier.submit(_copy, probe, (0,), received, (0,)).result()
        return received.tobytes()

    def _measure(self) -> float:
        assert self._rows is not None
        count = min(len(self._rows), max(1, _MEASURED_BYTES // self._block_bytes))
        scratch = np.zeros((count, self._block_bytes), np.uint8)
        for _ in range(2):  # the first run faults the mapping's pages in
            milliseconds = self._copier.submit(_copy, self._rows, range(count), scratch, range(count)).result()
        return scratch.nbytes / milliseconds * 1e3

    def read(self, src_blocks: Sequence[int], dst: KvPool, dst_blocks: Sequence[int]) -> ThreadTransfer:
        if self._rows is None:
            raise TransferFailed("the peer's pool was closed")
        target = block_rows.of_pool(dst)
        check_blocks(src_blocks, len(self._rows), dst_blocks, len(target))
        copy = self._copier.submit(_copy, self._rows, tuple(src_blocks), target, tuple(dst_blocks))
        return ThreadTransfer(copy, "copying from the peer's shared memory")

    def generations_hold(self, blocks: Sequence[int], expected: Sequence[int]) -> bool:
        return self._segment.generations_hold(blocks, expected)

    def owner_alive(self) -> bool:
        return self._segment.owner_alive()

    def close(self) -> None:
        self._copier.shutdown()
        self._rows = None
        self._segment.close()


def create(layout: KvLayout, device: torch.device, instance: str) -> ShmMemory:
    return ShmMemory(layout, instance)


def open_peer(descriptor: bytes, layout: KvLayout, device: torch.device) -> ShmPeer:
    return ShmPeer(descriptor, layout)


def _copy(source: Rows, src_blocks: Sequence[int], target: Rows, dst_blocks: Sequence[int]) -> float:
    started = time.perf_counter()
    block_rows.copy(source, src_blocks, target, dst_blocks)
    return (time.perf_counter() - started) * 1000
