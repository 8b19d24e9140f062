# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Programs of a launch that wait for nobody, and of which the last one to arrive goes on with what all have made."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ARRIVALS = 1 << 15


@lru_cache
def arrivals(device: torch.device) -> Tensor:
    """Counters [MAX_ARRIVALS] int32 for `is_last_to_arrive`. All are zero between launches.

    A device has one set, since its kernels run on one stream at a time. The first call allocates it, and must not be
    inside a graph's capture (nor can the kernel's compilation be).
    """
    return torch.zeros(MAX_ARRIVALS, dtype=torch.int32, device=device)


@triton.jit
def is_last_to_arrive(counter, count):
    """Called by `count` programs, after each has written its part. True in the last one to call: that one may read all
    parts, from L2 (.cg), where the other programs' writes are. Leaves the counter at zero."""
    # The barrier puts the writes of all threads before the release by the thread that counts; the last program's
    # acquire makes all of them visible.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
    if is_last:
        tl.store(counter, 0)
    return is_last
