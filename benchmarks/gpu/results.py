"""What kernels are timed on, and what is known of each afterwards."""

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
ROTATED_BYTES = 128 << 20  # inputs are rotated through at least this much, more than the L2 cache holds


@dataclass(frozen=True, slots=True)
class Result:
    kernel: str
    case: str
    error: float | None  # relative, against the reference; None: another's kernel, for comparison
    microseconds: float
    floor: float  # microseconds
    tolerance: float = 1e-2  # of the error; that of bfloat16

    def line(self) -> str:
        error = "" if self.error is None else f"{self.error:.1e}"
        share = self.floor / self.microseconds
        return f"{self.kernel:26} {self.case:24} {error:>8} {self.microseconds:9.1f} {self.floor:9.1f} {share:7.1%}"


@dataclass(frozen=True, slots=True)
class Ceilings:
    bandwidth: float  # bytes/s
    gemm: float  # operations/s

    def moving(self, count: float) -> float:
        """Microseconds to move so many bytes."""
        return count / self.bandwidth * 1e6

    def computing(self, operations: float) -> float:
        return operations / self.gemm * 1e6


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=DEVICE)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def sets_for(set_bytes: int) -> int:
    return max(1, min(32, -(-ROTATED_BYTES // set_bytes)))
