"""What kernels must know of a GPU."""

from functools import lru_cache

import torch
from torch import Tensor

_TMA_ALIGNMENT = 16  # bytes


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def is_hopper(device: torch.device) -> bool:
    return _capability(device)[0] == 9


def is_hopper_or_later(device: torch.device) -> bool:
    return _capability(device) >= (9, 0)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def shared_bytes(device: torch.device) -> int:
    """The largest shared memory of a thread block, in bytes."""
    if device.type == "cpu":
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # torch's stubs lack it


_OTHER_SHARED_BYTES = 27 << 10  # left for anything but pipeline stages


def stages_that_fit(most: int, stage_bytes: int, device: torch.device) -> int:
    """How many pipeline stages of this size a thread block's shared memory holds, up to `most`."""
    return min(most, (shared_bytes(device) - _OTHER_SHARED_BYTES) // stage_bytes)


def tma_aligned(*tensors: Tensor) -> bool:
    """Whether TMA, which copies tiles of matrices, can read these: they begin, as do their rows, at multiples of 16
    bytes."""
    addresses = (address for it in tensors for address in (it.data_ptr(), *(n * it.itemsize for n in it.stride()[:-1])))
    return all(address % _TMA_ALIGNMENT == 0 for address in addresses)
