"""Transport between hosts: NIXL reads the peer's memory over what UCX finds on the way: RDMA, NVLink, or TCP.

The owner registers its pool and, beside it in host memory, a control array: the nonce of this instance, then one
generation for each block. No lock tells across hosts that the owner is gone, so readers look whether its nonce is still
there. And no page of the owner's is mapped here, so a reader reads the generations after the blocks.
"""

import base64
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch import Tensor

from common.kv.kv_pool import KvLayout, KvPool
from common.transport.checks import PROBE_BYTES, check_blocks, check_layout, check_probe, generations_hold, new_probe
from common.transport.interface import TransferFailed, TransportError
from common.transport.nixl_agent import NotYet, ReadFailed, Spans, own_agent, spans
from common.transport.thread_transfer import ThreadTransfer

log = structlog.get_logger(__name__)

OPEN_SECONDS = 10.0  # to connect to a peer, and to prove it
_MEASURED_BYTES = 32 << 20
_HOST = torch.device("cpu")

Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a peer is told of a pool."""

    instance: str
    nonce: int  # the first number of the control array, until the owner closes the pool
    layout: KvLayout
    probe_digest: str
    agent: str  # NIXL's metadata of the owner's agent, in base64
    pool: int  # address of the pool; the probe lies behind it
    control: int  # address of the control array
    gpu: int | None  # index of the owner's GPU; None: the pool is in host memory

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, descriptor: bytes) -> Self:
        """Raises TransportError where it is no descriptor of this version."""
        try:
            fields = json.loads(descriptor)
            base64.b64decode(fields["agent"], validate=True)
            return cls(**{**fields, "layout": KvLayout(**fields["layout"])})
        except (ValueError, KeyError, TypeError) as error:
            raise TransportError(
                f"the peer's pool descriptor is malformed ({error!r}); run one version of all workers, with one "
                "--transport"
            ) from error

    @property
    def device(self) -> torch.device:
        return _HOST if self.gpu is None else torch.device("cuda", self.gpu)


class NixlMemory:
    """The owner's pool, registered for reading. See interface.PoolMemory."""

    def __init__(self, layout: KvLayout, device: torch.device, instance: str) -> None:
        agent = own_agent()
        size = layout.pool_bytes + PROBE_BYTES
        probe, digest = new_probe()
        try:
            memory = torch.empty(size, dtype=torch.uint8, device=device).zero_()  # which takes all its pages now
        except (RuntimeError, MemoryError) as error:
            raise TransportError(
                f"a KV pool of {size >> 20} MiB cannot be had on {device} ({error}); lower --num-blocks"
            ) from error
        memory[layout.pool_bytes :] = torch.frombuffer(bytearray(probe), dtype=torch.uint8)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.tensor: Tensor = memory[: layout.pool_bytes]
        self._control: Numbers = np.zeros(1 + layout.num_blocks, np.uint64)
        self._control[0] = nonce = secrets.randbits(63) | 1
        self.generations = self._control.data[1:]
        agent.register(memory.data_ptr(), size, memory.device)
        agent.register(self._control.ctypes.data, self._control.nbytes, _HOST)
        self.descriptor = Descriptor(
            instance=instance,
            nonce=nonce,
            layout=layout,
            probe_digest=digest,
            agent=base64.b64encode(agent.metadata()).decode(),
            pool=memory.data_ptr(),
            control=self._control.ctypes.data,
            gpu=memory.device.index if device.type == "cuda" else None,
        ).to_bytes()

    def close(self) -> None:
        self._control[0] = 0


class NixlPeer:
    """A peer's pool, read through this process's agent. See interface.PeerPool."""

    def __init__(self, descriptor: bytes, layout: KvLayout, device: torch.device) -> None:
        self._theirs = Descriptor.from_bytes(descriptor)
        check_layout(f"worker {self._theirs.instance}", self._theirs.layout, layout)
        self._device = device
        self._agent = own_agent()
        # What was read of the owner's control array. Only the reader's thread writes to it.
        self._control: Numbers = np.zeros(1 + self._theirs.layout.num_blocks, np.uint64)
        self._agent.register(self._control.ctypes.data, self._control.nbytes, _HOST)
        self._name = ""
        self._gone = False
        self._closed = threading.Event()
        self._open_until = time.monotonic() + OPEN_SECONDS
        # A thread of its own: UCX copies inside the call that starts a read where both memories are of one host.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nixl-read", initializer=self._use_device)
        try:
            self.bytes_per_second = self._reader.submit(self._prove, layout.num_blocks).result()
        except (ReadFailed, NotYet) as error:
            self.close()
            raise TransportError(
                f"the memory of worker {self._theirs.instance} cannot be read through NIXL ({error!r}): the worker is "
                "gone, or runs another version, or UCX finds no way there (see UCX_TLS and UCX_NET_DEVICES)"
            ) from error
        except BaseException:
            self.close()
            raise
        self._open_until = math.inf
        self._looking: Future[None] = self._reader.submit(lambda: None)
        log.info(
            "opened a peer's pool",
            transport="nixl",
            instance=self._theirs.instance,
            ucx_tls=os.environ.get("UCX_TLS", "all"),
            probe="intact",
            gigabytes_per_second=round(self.bytes_per_second / 1e9, 2),
        )

    def read(self, src_blocks: Sequence[int], dst: KvPool, dst_blocks: Sequence[int]) -> ThreadTransfer:
        if self._closed.is_set():
            raise TransferFailed("the peer's pool was closed")
        check_blocks(src_blocks, self._theirs.layout.num_blocks, dst_blocks, dst.layout.num_blocks)
        self._agent.register(dst.tensor.data_ptr(), dst.layout.pool_bytes, dst.tensor.device)
        reading = self._reader.submit(self._read_checked, tuple(src_blocks), dst, tuple(dst_blocks))
        return ThreadTransfer(reading, "reading the peer's blocks through NIXL")

    def generations_hold(self, blocks: Sequence[int], expected: Sequence[int]) -> bool:
        """As of the last transfer of these blocks that ended."""
        return generations_hold(self._control[1:].data, blocks, expected)

    def owner_alive(self) -> bool:
        """Asks the owner, too, for the next call to know."""
        if not self._gone and self._looking.done():
            self._looking = self._reader.submit(self._look)
        return not self._gone

    def close(self) -> None:
        """Waits for no read: one that is under way may still write to its target."""
        self._closed.set()
        self._reader.shutdown(cancel_futures=True)
        self._agent.disconnect(self._name)
        self._agent.deregister(self._control.ctypes.data, self._control.nbytes)

    # ------------------------------------------------------------ on the reader's thread

    def _use_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _read_checked(self, src_blocks: Sequence[int], dst: KvPool, dst_blocks: Sequence[int]) -> float:
        """Reads blocks, then their generations. Returns the milliseconds of the former."""
        if not src_blocks:
            return 0.0
        seconds = self._read_blocks(src_blocks, dst.tensor, dst_blocks)
        self._read_control(1 + min(src_blocks), 2 + max(src_blocks))
        return seconds * 1000

    def _look(self) -> None:
        try:
            self._check_nonce()
        except (ReadFailed, NotYet, TransportError) as error:
            self._gone = True
            log.info("a peer's pool is out of reach", instance=self._theirs.instance, reason=str(error))

    def _check_nonce(self) -> None:
        self._read_control(0, 1)
        if self._control[0] != self._theirs.nonce:
            raise TransportError(f"worker {self._theirs.instance} closed its pool")

    def _prove(self, capacity: int) -> float:
        """Connects, and compares the probe. Returns the bytes a second at which blocks were read."""
        self._name = self._agent.connect(base64.b64decode(self._theirs.agent))
        self._check_nonce()
        block_bytes = self._theirs.layout.block_bytes
        count = min(self._theirs.layout.num_blocks, capacity, max(1, _MEASURED_BYTES // block_bytes))
        scratch = torch.zeros(max(PROBE_BYTES, count * block_bytes), dtype=torch.uint8, device=self._device)
        self._agent.register(scratch.data_ptr(), scratch.nbytes, scratch.device)
        try:
            probe = _span(self._theirs.pool + self._theirs.layout.pool_bytes, PROBE_BYTES, self._theirs.device)
            self._read(probe, _span(scratch.data_ptr(), PROBE_BYTES, scratch.device), scratch)
            received = scratch[:PROBE_BYTES].cpu().numpy().tobytes()
            check_probe(received, self._theirs.probe_digest, self._theirs.instance)
            for _ in range(2):  # the first read faults pages in
                seconds = self._read_blocks(range(count), scratch, range(count))
        finally:
            self._agent.deregister(scratch.data_ptr(), scratch.nbytes)
        return count * block_bytes / seconds

    def _read_blocks(self, src_blocks: Sequence[int], target: Tensor, dst_blocks: Sequence[int]) -> float:
        """Reads blocks of the owner's pool into blocks of `target`. Returns the seconds that it took."""
        started = time.perf_counter()
        source = self._blocks_at(self._theirs.pool, self._theirs.device, src_blocks)
        self._read(source, self._blocks_at(target.data_ptr(), target.device, dst_blocks), target)
        return time.perf_counter() - started

    def _blocks_at(self, address: int, device: torch.device, blocks: Sequence[int]) -> Spans:
        block_bytes = self._theirs.layout.block_bytes
        addresses = np.uint64(address) + np.asarray(blocks, np.uint64) * np.uint64(block_bytes)
        return spans(addresses, block_bytes, device)

    def _read_control(self, start: int, end: int) -> None:
        """Reads numbers `start` to `end` of the owner's control array."""
        num_bytes = 8 * (end - start)
        self._read(
            _span(self._theirs.control + 8 * start, num_bytes, _HOST),
            _span(self._control.ctypes.data + 8 * start, num_bytes, _HOST),
            self._control,
        )

    def _read(self, source: Spans, target: Spans, keep: object) -> None:
        try:
            self._agent.read(self._name, source, target, self._give_up, keep)
        except ReadFailed:
            self._gone = True  # to be opened anew, if the worker is still there
            raise

    def _give_up(self) -> bool:
        return self._closed.is_set() or time.monotonic() > self._open_until


def create(layout: KvLayout, device: torch.device, instance: str) -> NixlMemory:
    return NixlMemory(layout, device, instance)


def open_peer(descriptor: bytes, layout: KvLayout, device: torch.device) -> NixlPeer:
    return NixlPeer(descriptor, layout, device)


def _span(address: int, num_bytes: int, device: torch.device) -> Spans:
    return spans(np.array([address], np.uint64), num_bytes, device)
