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

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.cuda.gpu import is_hopper_or_later

enabled = True  # benchmarks switch it off, to compare


def dependent(device: torch.device) -> dict[str, bool]:
    """Launch options of a Triton kernel that has the constant DEPENDENT."""
    return {"DEPENDENT": True, "launch_pdl": True} if enabled and is_hopper_or_later(device) else {"DEPENDENT": False}


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
