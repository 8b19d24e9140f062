"""Page-locked memory of the host beside a GPU's pool, which the GPU's copy engines read and write.

They leave all SMs to the model. A kernel that copies would take some, and those of decode steps have a thread block for
each SM: where one is taken, they need a second round.
"""

from collections.abc import Sequence

import cupy
import torch

from common.kv import block_rows
from common.kv.host_room import HostMemoryError
from common.kv.kv_pool import KvPool

_TO_HOST, _TO_DEVICE = cupy.cuda.runtime.memcpyDeviceToHost, cupy.cuda.runtime.memcpyHostToDevice


class PinnedMemory:
    """See host_cache.HostMemory."""

    def __init__(self, pool: KvPool, num_blocks: int) -> None:
        """Raises HostMemoryError if CUDA does not lock so much memory."""
        self.num_blocks = num_blocks
        self._block_bytes = pool.layout.block_bytes
        self._device = pool.tensor.device
        self._pool = pool.tensor.data_ptr()
        with torch.cuda.device(self._device):
            self._memory = _page_locked(num_blocks * self._block_bytes)
            # Apart, so that a prompt does not wait for what others have published.
            self._saves: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._loads: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> "StreamCopy":
        return self._copy(self._saves, _TO_HOST, self._pool, blocks, self._memory.ptr, slots)

    def load(self, slots: Sequence[int], blocks: Sequence[int]) -> "StreamCopy":
        return self._copy(self._loads, _TO_DEVICE, self._memory.ptr, slots, self._pool, blocks)

    def close(self) -> None:
        self._saves.synchronize()
        self._loads.synchronize()

    def _copy(
        self,
        stream: torch.cuda.Stream,
        kind: int,
        source: int,
        src_blocks: Sequence[int],
        target: int,
        dst_blocks: Sequence[int],
    ) -> "StreamCopy":
        size = self._block_bytes
        with torch.cuda.device(self._device):
            for src, dst, count in block_rows.runs(src_blocks, dst_blocks):
                cupy.cuda.runtime.memcpyAsync(
                    target + dst * size, source + src * size, count * size, kind, stream.cuda_stream
                )
            return StreamCopy(stream.record_event())


class StreamCopy:
    def __init__(self, arrival: torch.cuda.Event) -> None:
        self._arrival = arrival

    def done(self) -> bool:
        return bool(self._arrival.query())  # type: ignore[no-untyped-call]


def _page_locked(size: int) -> cupy.cuda.PinnedMemory:
    try:
        return cupy.cuda.PinnedMemory(size)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise HostMemoryError(
            f"{size >> 20} MiB of the host's memory cannot be locked ({error}); lower --host-cache-gib"
        ) from error
