# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""RMS norm on CUDA, one program a row; `kernels.norm` holds the reference and the formula."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import dependent, prefetch_to_l2, wait_for_previous


@triton.jit(do_not_specialize=["prefetched_bytes"])
def _rms_norm_kernel(
    x,
    weight,
    out,
    next_weight,
    prefetched_bytes,
    x_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """With PREFETCH, each program asks for so many bytes of the next weight, a multiple of 16."""
    row = tl.program_id(0).to(tl.int64)
    if DEPENDENT and PREFETCH:
        prefetch_to_l2(next_weight.to(tl.int64) + row * prefetched_bytes, prefetched_bytes)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(DEPENDENT)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value) / WIDTH + eps)
    dtype = out.dtype.element_ty
    tl.store(out + row * WIDTH + column, (normed.to(dtype).to(tl.float32) * scale).to(dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, next_weight: Tensor | None = None) -> Tensor:
    """`kernels.norm.rms_norm` for a CUDA tensor [T, H] whose last dimension is contiguous.

    `next_weight`, contiguous, is brought to the L2 cache meanwhile for the kernel that comes next: that one may find no
    room on the multiprocessors to ask for it so early.
    """
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    if rows:
        _rms_norm_kernel[(rows,)](
            x,
            weight,
            out,
            weight if next_weight is None else next_weight,
            0 if next_weight is None else next_weight.nbytes // rows // 16 * 16,
            x.stride(0),
            eps,
            WIDTH=width,
            BLOCK=block,
            PREFETCH=next_weight is not None,
            num_warps=min(max(block // 256, 1), 16),
            **dependent(x.device),
        )
    return out
