# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Programmatic dependent launch (CUDA C++ Programming Guide, section 6.2.1.6): a kernel's programs start while the one
before it still runs, and wait where they need its results. It hides most of the launch between two short kernels.

Rules for a kernel that is launched so: every program calls `wait_for_previous` once, before it returns, reads what
earlier kernels wrote and writes anything. The call lets the next kernel's programs start, when everything before this
kernel has ended. Where the next one may have much to load that no kernel writes, a kernel lets it start at once instead
(`let_next_start`).

Before the wait a kernel may read weights, and what a kernel wrote that had ended when the one right before this was let
in: between the two lies one that lets the next start at its wait, or is not launched so, as torch's own are not. And
that from L2 (.cg): until the wait, a multiprocessor's L1 may hold what was there before.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

enabled = True  # benchmarks compare


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def is_hopper(device: torch.device) -> bool:
    return _capability(device)[0] == 9


def is_hopper_or_later(device: torch.device) -> bool:
    return _capability(device) >= (9, 0)


def dependent(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that has the constant DEPENDENT."""
    return {"DEPENDENT": True, "launch_pdl": True} if enabled and is_hopper_or_later(device) else {"DEPENDENT": False}


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def shared_bytes(device: torch.device) -> int:
    """The most shared memory that a program can have."""
    if device.type == "cpu":
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # torch's stubs lack it


MAX_ARRIVALS = 1 << 15


@lru_cache
def arrivals(device: torch.device) -> Tensor:
    """[MAX_ARRIVALS] int32 that programs count themselves in with when the last of some merges their parts; zero
    between launches. One set for a device: its kernels run on one stream at a time. Made on the first call, which must
    not be inside a graph's capture (compilation cannot be either)."""
    return torch.zeros(MAX_ARRIVALS, dtype=torch.int32, device=device)


@triton.jit
def is_last_to_arrive(counter, count):
    """Called by `count` programs, each of which has written a part: true in the last one, which may read all parts,
    from L2 (.cg), where the others' writes are. Leaves the counter at zero."""
    # all threads' parts are written before the release by the thread that counts; the last one acquires them all
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr, LET_NEXT_START: tl.constexpr = True):
    """Waits until all kernels before this one have ended, then lets the next one's programs start."""
    if DEPENDENT:
        gdc_wait()
        if LET_NEXT_START:
            gdc_launch_dependents()


@triton.jit
def let_next_start(DEPENDENT: tl.constexpr):
    """Lets the next kernel's programs start as soon as all of this one's have, before the wait that then lets none."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def prefetch_to_l2(address, size):
    """Asks for `size` bytes to be brought to the L2 cache, once a program; address and size are multiples of 16."""
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
    """Asks for the cache line of each address."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [addresses.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
