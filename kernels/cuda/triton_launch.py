# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Programmatic dependent launch (PDL; CUDA C++ Programming Guide, section 6.2.1.6): a kernel's programs start while the
kernel before it still runs, and wait where they need its results. That hides most of the launch latency between two
short kernels.

Rules for a kernel that is launched this way:

- Every program calls `wait_for_previous` once, before it reads what earlier kernels wrote, before it writes anything,
  and before it returns.
- That call also lets the next kernel's programs start, as soon as everything before this kernel has ended. If the next
  kernel may have much to load that no kernel writes (weights), this one lets it start at once instead:
  `let_next_start`.
- Before the wait, a kernel may read weights, and results of kernels that must have ended by then: those with another
  kernel in between that lets the next one start only at its wait, or that is not launched this way, as torch's own are
  not. It has to read such results from L2 (.cg), as the SM's L1 may hold stale data until the wait.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

enabled = True  # benchmarks switch it off, to compare


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def is_hopper(device: torch.device) -> bool:
    return _capability(device)[0] == 9


def is_hopper_or_later(device: torch.device) -> bool:
    return _capability(device) >= (9, 0)


def dependent(device: torch.device) -> dict[str, bool]:
    """Launch options of a Triton kernel that has the constant DEPENDENT."""
    return {"DEPENDENT": True, "launch_pdl": True} if enabled and is_hopper_or_later(device) else {"DEPENDENT": False}


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


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr, LET_NEXT_START: tl.constexpr = True):
    """Waits until all kernels before this one have ended, then lets the next kernel's programs start."""
    if DEPENDENT:
        gdc_wait()
        if LET_NEXT_START:
            gdc_launch_dependents()


@triton.jit
def let_next_start(DEPENDENT: tl.constexpr):
    """Lets the next kernel's programs start as soon as all of this one's have started. Called before
    `wait_for_previous`, which then has LET_NEXT_START=False."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def prefetch_to_l2(address, size):
    """Prefetches `size` bytes to L2, once per program. address and size are multiples of 16."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [address.to(tl.int64), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_lines_to_l2(addresses):
    """Prefetches the cache line of each address to L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [addresses.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
