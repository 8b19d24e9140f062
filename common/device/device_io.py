"""Moving small arrays between host and device without making either wait."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of `array` on `device`, same shape and dtype. On CUDA it goes through pinned memory in stream order;
    torch's pinned allocator keeps the staging buffer until the copy has run."""
    return _staged(array, device).to(device, non_blocking=True)


def copy_to_device(array: NDArray[Any], target: Tensor) -> None:
    """Copies a one-dimensional array to the beginning of `target`, in the same way."""
    target[: len(array)].copy_(_staged(array, target.device), non_blocking=True)


def _staged(array: NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory()


class HostCopy:
    """A device tensor on its way to the host. `get` waits for this copy and nothing later."""

    def __init__(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu":
            self._host = tensor
        else:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
        self._arrival = mark(tensor.device)

    @property
    def arrived(self) -> bool:
        return self._arrival is None or bool(self._arrival.query())  # type: ignore[no-untyped-call]

    def get(self) -> Tensor:
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._host

    def seconds_since(self, earlier: torch.cuda.Event | None) -> float:
        """Device time from `earlier`, a `mark`, until the copy arrived, which it must have; 0 on a CPU."""
        if self._arrival is None or earlier is None:
            return 0.0
        return float(earlier.elapsed_time(self._arrival)) / 1000


def mark(device: torch.device) -> torch.cuda.Event | None:
    """An event behind everything launched so far on the current stream, to measure time from. None on a CPU."""
    if device.type == "cpu":
        return None
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.current_stream().record_event(event)
    return event
