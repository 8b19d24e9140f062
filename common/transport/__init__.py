"""KV transports: how a decode worker reads blocks out of a prefill worker's pool. See interface.py for the parts."""

from typing import Protocol

import torch

from common.kv.kv_pool import KvLayout
from common.transport import shm
from common.transport.interface import PeerPool, PoolMemory, Transfer, TransferFailed, TransportError
from common.transport.segment import sweep

__all__ = [
    "PeerPool",
    "PoolMemory",
    "Transfer",
    "TransferFailed",
    "TransportError",
    "create",
    "crosses_hosts",
    "open_peer",
    "sweep",
]


class _Transport(Protocol):
    def create(self, layout: KvLayout, device: torch.device, instance: str) -> PoolMemory: ...

    def open_peer(self, descriptor: bytes, layout: KvLayout, device: torch.device) -> PeerPool: ...


def create(transport: str, layout: KvLayout, device: torch.device, instance: str) -> PoolMemory:
    """Allocates this worker's own pool, once, where peers can read it over `transport` ("shm", "cuda_ipc" or
    "nixl").

    Segments that killed workers left behind on this machine are removed first.

    Args:
        layout: shape of the pool.
        device: where the pool lies; a CPU for shm, a CUDA device for cuda_ipc, either for nixl.
        instance: name of this process, new with every start: letters, digits, "-" and "_".

    Raises:
        TransportError: the transport does not work on this device or machine, or there is too little memory.
    """
    sweep()
    return _transport(transport, device).create(layout, device, instance)


def open_peer(descriptor: bytes, transport: str, layout: KvLayout, device: torch.device) -> PeerPool:
    """Opens the pool of another worker, by its `descriptor`, to read blocks into pools of `layout` on `device`.

    The peer's blocks must be laid out as the reader's are (the number of blocks may differ). Known bytes of the peer
    are read the way blocks will be, and compared by checksum; the speed is measured and logged.

    Raises:
        TransportError: the peer is gone or out of reach, its layout differs, or the probe was not read intact.
    """
    return _transport(transport, device).open_peer(descriptor, layout, device)


def crosses_hosts(transport: str) -> bool:
    """Whether it reads pools of other hosts, too."""
    return transport == "nixl"


def _transport(name: str, device: torch.device) -> _Transport:
    if name == "shm":
        if device.type != "cpu":
            raise TransportError(f"transport shm is for CPUs, and the device is {device}; use --transport cuda_ipc")
        return shm
    if name == "cuda_ipc":
        if device.type != "cuda":
            raise TransportError(f"transport cuda_ipc is for GPUs, and the device is {device}; use --transport shm")
        try:
            import common.transport.cuda_ipc as cuda_ipc  # needs cupy, which only GPUs come with
        except ImportError as error:
            raise TransportError(f"transport cuda_ipc needs cupy ({error}); install twostroke[cuda]") from error
        return cuda_ipc
    if name == "nixl":
        try:
            import common.transport.nixl as nixl  # a package of its own, which only clusters of several hosts need
        except ImportError as error:
            raise TransportError(f"transport nixl needs NIXL ({error}); install twostroke[nixl]") from error
        return nixl
    raise TransportError(f'no transport is called "{name}"; there are shm, cuda_ipc and nixl')
