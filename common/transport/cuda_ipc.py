"""Transport for GPUs of one host: the owner allocates the pool by cudaMalloc, readers map it by its IPC handle.

Header and generations are in a segment of /dev/shm, as with shm, where the reader's CPU can look at them. It takes a
plain cudaMalloc, because torch's expandable segments have no such handle. A process cannot open its own handle.
"""

from collections.abc import Sequence

import cupy
import numpy as np
import structlog
import torch
from torch import Tensor

from common.kv.kv_pool import KvLayout, KvPool
from common.transport.block_copy import CTAS, BlockCopier, BlockCopy, prepare
from common.transport.checks import PROBE_BYTES, check_blocks, check_probe, new_probe
from common.transport.interface import TransferFailed, TransportError
from common.transport.segment import OwnSegment, PeerSegment

log = structlog.get_logger(__name__)

_MEASURED_BYTES = 32 << 20
_CUDA_ERRORS = (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError)


class CudaMemory:
    """The owner's pool: one cudaMalloc, and a segment that describes it. See interface.PoolMemory."""

    def __init__(self, layout: KvLayout, device: int, instance: str) -> None:
        self._segment = OwnSegment(instance, layout, body_bytes=0)
        probe, digest = new_probe()
        size = layout.pool_bytes + PROBE_BYTES
        try:
            with cupy.cuda.Device(device) as current:
                memory = cupy.cuda.Memory(size)
                array = cupy.ndarray(size, np.uint8, cupy.cuda.MemoryPointer(memory, 0))
                array.data.memset(0, size)
                array[layout.pool_bytes :].set(np.frombuffer(probe, np.uint8))
                current.synchronize()
                handle: bytes = cupy.cuda.runtime.ipcGetMemHandle(memory.ptr)
        except (MemoryError, *_CUDA_ERRORS) as error:
            self._segment.close()
            free, total = torch.cuda.mem_get_info(device)
            raise TransportError(
                f"a KV pool of {size >> 20} MiB cannot be had on GPU {device} ({error}), which has {free >> 20} of "
                f"{total >> 20} MiB free; lower --num-blocks if that is too little"
            ) from error
        self.tensor: Tensor = torch.as_tensor(array, device=torch.device("cuda", device))[: layout.pool_bytes]
        self._segment.publish(digest)
        self.generations = self._segment.generations
        self.descriptor = self._segment.descriptor(gpu=_uuid(device), handle=handle.hex())

    def close(self) -> None:
        self._segment.close()


class CudaTransfer:
    """A launched copy. See interface.Transfer."""

    def __init__(self, copy: BlockCopy) -> None:
        self._copy = copy

    @property
    def milliseconds(self) -> float:
        return self._copy.milliseconds

    def done(self) -> bool:
        try:
            return self._copy.done()
        except _CUDA_ERRORS as error:
            raise TransferFailed(f"copying from the peer's GPU memory failed: {error}") from error

    def wait(self) -> None:
        try:
            self._copy.wait()
        except _CUDA_ERRORS as error:
            raise TransferFailed(f"copying from the peer's GPU memory failed: {error}") from error


class CudaPeer:
    """A peer's pool, mapped into this GPU's address space. See interface.PeerPool."""

    def __init__(self, descriptor: bytes, layout: KvLayout, device: int, ctas: int) -> None:
        self._segment = PeerSegment(descriptor, layout)
        self._device = device
        self._block_bytes = layout.block_bytes
        self._pointer = 0
        try:
            self._copier = BlockCopier(device, layout.num_blocks, ctas)
            self._pointer = self._map()
            check_probe(self._read_probe(), self._segment.header.probe_digest, self._segment.header.instance)
            self.bytes_per_second = self._measure(layout.num_blocks)
            log.info(
                "opened a peer's pool",
                transport="cuda_ipc",
                instance=self._segment.header.instance,
                gpu=self._segment.extra["gpu"],
                probe="intact",
                gigabytes_per_second=round(self.bytes_per_second / 1e9, 1),
            )
        except _CUDA_ERRORS as error:
            self.close()
            raise TransportError(
                f"reading the GPU memory of worker {self._segment.header.instance} failed: {error}"
            ) from error
        except BaseException:
            self.close()
            raise

    def _map(self) -> int:
        instance = self._segment.header.instance
        try:
            gpu, handle = self._segment.extra["gpu"], bytes.fromhex(self._segment.extra["handle"])
        except (KeyError, ValueError, TypeError) as error:
            raise TransportError(
                f"worker {instance} has no GPU memory to map; start all workers with one --transport"
            ) from error
        try:
            with cupy.cuda.Device(self._device):
                return int(cupy.cuda.runtime.ipcOpenMemHandle(handle))  # enables peer access between the two GPUs
        except _CUDA_ERRORS as error:
            raise TransportError(
                f"GPU memory of worker {instance} cannot be mapped ({error}): {_reason(gpu, self._device)}"
            ) from error

    def _read_probe(self) -> bytes:
        with cupy.cuda.Device(self._device), self._copier.stream:
            received = cupy.zeros(PROBE_BYTES, np.uint8)
            probe = self._pointer + self._segment.header.layout.pool_bytes
            self._copier.start(probe, (0,), received.data.ptr, (0,), PROBE_BYTES).wait()
            return bytes(received.get().tobytes())

    def _measure(self, capacity: int) -> float:
        theirs = self._segment.header.layout.num_blocks
        count = min(theirs, capacity, max(1, _MEASURED_BYTES // self._block_bytes))
        blocks = range(count)
        with cupy.cuda.Device(self._device), self._copier.stream:
            scratch = cupy.empty(count * self._block_bytes, np.uint8)
            for _ in range(2):  # the first run faults the mapping's pages in
                copy = self._copier.start(self._pointer, blocks, scratch.data.ptr, blocks, self._block_bytes)
                copy.wait()
        return count * self._block_bytes / copy.milliseconds * 1e3

    def read(self, src_blocks: Sequence[int], dst: KvPool, dst_blocks: Sequence[int]) -> CudaTransfer:
        if not self._pointer:
            raise TransferFailed("the peer's pool was closed")
        check_blocks(src_blocks, self._segment.header.layout.num_blocks, dst_blocks, dst.layout.num_blocks)
        try:
            copy = self._copier.start(self._pointer, src_blocks, dst.tensor.data_ptr(), dst_blocks, self._block_bytes)
        except (ValueError, *_CUDA_ERRORS) as error:
            raise TransferFailed(f"copying from the peer's GPU memory failed: {error}") from error
        return CudaTransfer(copy)

    def generations_hold(self, blocks: Sequence[int], expected: Sequence[int]) -> bool:
        return self._segment.generations_hold(blocks, expected)

    def owner_alive(self) -> bool:
        return self._segment.owner_alive()

    def close(self) -> None:
        if self._pointer:
            with cupy.cuda.Device(self._device):
                self._copier.stream.synchronize()
                cupy.cuda.runtime.ipcCloseMemHandle(self._pointer)
            self._pointer = 0
        self._segment.close()


def create(layout: KvLayout, device: torch.device, instance: str) -> CudaMemory:
    index = _index(device, layout)
    try:
        prepare(index)
    except Exception as error:  # cupy's errors have no common base class
        raise TransportError(
            f"cupy cannot compile the copy kernel ({error!r}): install the cupy that fits the driver's CUDA"
        ) from error
    return CudaMemory(layout, index, instance)


def open_peer(descriptor: bytes, layout: KvLayout, device: torch.device, ctas: int = CTAS) -> CudaPeer:
    return CudaPeer(descriptor, layout, _index(device, layout), ctas)


def _index(device: torch.device, layout: KvLayout) -> int:
    if layout.block_bytes % 16:
        raise TransportError(
            f"transport cuda_ipc copies 16 bytes at a time, and a block has {layout.block_bytes}: raise --block-size"
        )
    return torch.cuda.current_device() if device.index is None else device.index


def _uuid(device: int) -> str:
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _reason(gpu: str, device: int) -> str:
    visible = {_uuid(index): index for index in range(torch.cuda.device_count())}
    if gpu not in visible:
        return (
            f"its {gpu} is not visible here ({', '.join(visible)} is): let CUDA_VISIBLE_DEVICES of both workers, and "
            "the devices given to both containers, include both GPUs"
        )
    if visible[gpu] != device and not cupy.cuda.runtime.deviceCanAccessPeer(device, visible[gpu]):
        return (
            f"{_uuid(device)} cannot read the memory of {gpu} (see nvidia-smi topo -p2p r): place the workers on GPUs "
            "that have peer access"
        )
    return "containers of one host need ipc: host and pid: host to share GPU memory"
