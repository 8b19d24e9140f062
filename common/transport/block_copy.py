"""Copies many scattered blocks in one launch, from memory of this GPU or mapped from another."""

from collections.abc import Sequence
from dataclasses import dataclass

import cupy
import numpy as np
import numpy.typing as npt

THREADS = 1024
_NOT_READY = 600  # cudaErrorNotReady

CTAS = 16  # reads at the link's speed from blocks of 64 KiB on, and leaves most of the SMs to decoding

# A slice is what the threads of one CTA copy with one 16-byte load each. A CTA takes 8 slices at a time and has all 8
# loads under way before it stores the first: 128 KiB in flight hide the link's latency. Slices are dealt out across
# blocks, so small blocks keep as much in flight as large ones. Lane i of each warp looks up the blocks of slice i and
# hands them to the others: looked up by every thread, they would need more than the 64 registers that 1024 threads
# leave each, and a load that is spilled is waited for.
_SOURCE = r"""
constexpr unsigned THREADS = 1024, IN_FLIGHT = 8, ALL = 0xffffffff;

// ids: the source block of each pair, then the target block of each.
extern "C" __global__ void __launch_bounds__(THREADS)
copy_blocks(const uint4* __restrict__ source, uint4* __restrict__ target, const unsigned* __restrict__ ids,
            unsigned pairs, unsigned block_vectors, unsigned slices_per_block) {
    const unsigned slices = pairs * slices_per_block;
    for (unsigned first = blockIdx.x * IN_FLIGHT; first < slices; first += gridDim.x * IN_FLIGHT) {
        const unsigned pair = min(first + threadIdx.x % IN_FLIGHT, slices - 1) / slices_per_block;
        const unsigned from = __ldg(ids + pair), to = __ldg(ids + pairs + pair);
        const unsigned first_slice = first % slices_per_block;
        uint4 held[IN_FLIGHT];
        unsigned slice = first_slice;
#pragma unroll
        for (unsigned i = 0; i < IN_FLIGHT; ++i) {
            const size_t block = __shfl_sync(ALL, from, i);
            const unsigned vector = min(slice * THREADS + threadIdx.x, block_vectors - 1);  // idle threads read along
            held[i] = __ldcs(source + block * block_vectors + vector);
            if (++slice == slices_per_block) slice = 0;
        }
        slice = first_slice;
#pragma unroll
        for (unsigned i = 0; i < IN_FLIGHT; ++i) {
            const size_t block = __shfl_sync(ALL, to, i);
            const unsigned vector = slice * THREADS + threadIdx.x;
            if (first + i < slices && vector < block_vectors)
                __stcs(target + block * block_vectors + vector, held[i]);
            if (++slice == slices_per_block) slice = 0;
        }
    }
}
"""

_kernel = cupy.RawKernel(_SOURCE, "copy_blocks", options=("-std=c++17",))


def prepare(device: int) -> None:
    """Compiles the kernel, or finds it in cupy's cache on disk, so that no reader waits for that later.

    Raises whatever cupy and NVRTC raise where their libraries are missing or do not fit the driver.
    """
    with cupy.cuda.Device(device):
        _kernel.compile()


@dataclass(frozen=True, slots=True)
class _Slot:
    """What one copy needs for itself until it is done."""

    pinned: npt.NDArray[np.uint32]  # [2 * capacity]: source ids, then target ids, without a gap
    ids: cupy.ndarray  # the same on the GPU
    started: cupy.cuda.Event
    ended: cupy.cuda.Event


class BlockCopier:
    """Copies batches of blocks into one GPU's memory, in order, on a stream of its own. For one thread at a time.

    Args:
        device: index of the GPU that copies and owns the target.
        capacity: most blocks in one batch.
        ctas: thread blocks that copy, of 1024 threads each, which take an SM each while they run.

    Attributes:
        stream: the cupy stream that copies run on.
    """

    def __init__(self, device: int, capacity: int, ctas: int = CTAS) -> None:
        self._device = cupy.cuda.Device(device)
        self._capacity = capacity
        self._ctas = ctas
        with self._device:
            # A high priority, or the next kernel of a decode step would take each SM as soon as it is free.
            self.stream = cupy.cuda.Stream(non_blocking=True, priority=-1)
        self._idle = [self._new_slot()]

    def start(
        self, source: int, src_blocks: Sequence[int], target: int, dst_blocks: Sequence[int], block_bytes: int
    ) -> "BlockCopy":
        """Launches the copy of block src_blocks[i] at address `source` to block dst_blocks[i] at address `target`.

        The addresses are aligned to 16 bytes, and blocks of `block_bytes`, a multiple of 16, lie back to back at both.

        Raises:
            ValueError: more blocks than the capacity, or `block_bytes` is no multiple of 16.
            cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError: CUDA refused.
        """
        count = len(src_blocks)
        if count > self._capacity:
            raise ValueError(f"{count} blocks, and the copier was made for {self._capacity}")
        if block_bytes % 16:
            raise ValueError(f"blocks of {block_bytes} bytes, which is no multiple of 16")
        vectors = block_bytes // 16
        slices_per_block = -(-vectors // THREADS)
        with self._device:
            slot = self._idle.pop() if self._idle else self._new_slot()
            slot.pinned[:count] = src_blocks
            slot.pinned[count : 2 * count] = dst_blocks
            grid = min(self._ctas, -(-count * slices_per_block // 8))
            arguments = (
                np.uint64(source),
                np.uint64(target),
                slot.ids,
                np.uint32(count),
                np.uint32(vectors),
                np.uint32(slices_per_block),
            )
            slot.started.record(self.stream)
            if count:
                slot.ids.data.copy_from_host_async(slot.pinned.ctypes.data, 8 * count, self.stream)
                with self.stream:
                    _kernel((grid,), (THREADS,), arguments)
            slot.ended.record(self.stream)
        return BlockCopy(slot, self._idle)

    def _new_slot(self) -> _Slot:
        with self._device:
            return _Slot(
                pinned=np.frombuffer(cupy.cuda.alloc_pinned_memory(8 * self._capacity), np.uint32, 2 * self._capacity),
                ids=cupy.empty(2 * self._capacity, np.uint32),
                started=cupy.cuda.Event(),
                ended=cupy.cuda.Event(),
            )


class BlockCopy:
    """A batch under way."""

    def __init__(self, slot: _Slot, idle: list[_Slot]) -> None:
        self._slot: _Slot | None = slot
        self._idle = idle
        self._milliseconds = 0.0

    @property
    def milliseconds(self) -> float:
        """From the upload of the ids to the last byte, on the GPU's clock. 0 until done."""
        return self._milliseconds

    def done(self) -> bool:
        """Polls. Raises CUDARuntimeError where the GPU failed."""
        if self._slot is None:
            return True
        status = cupy.cuda.runtime.eventQuery(self._slot.ended.ptr)
        if status == _NOT_READY:
            return False
        if status != 0:  # cupy's own Event.done takes an error for "not yet"
            raise cupy.cuda.runtime.CUDARuntimeError(status)
        self._finish(self._slot)
        return True

    def wait(self) -> None:
        if self._slot is not None:
            self._slot.ended.synchronize()
            self._finish(self._slot)

    def _finish(self, slot: _Slot) -> None:
        self._milliseconds = float(cupy.cuda.get_elapsed_time(slot.started, slot.ended))
        self._idle.append(slot)
        self._slot = None
