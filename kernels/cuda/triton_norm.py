# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""RMS norm on CUDA, with one program per row; `kernels.norm` holds the reference and the formula."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.triton_launch import dependent, let_next_start, wait_for_previous


@triton.jit
def normalized(row, weight, eps, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """The norm of a row of WIDTH values, and zeros behind them; row and weight in float32. Rounded as the reference
    rounds, to DTYPE."""
    normed = row * tl.rsqrt(tl.sum(row * row) / WIDTH + eps)
    return (normed.to(DTYPE).to(tl.float32) * weight).to(DTYPE)


@triton.jit
def _rms_norm_kernel(
    x,
    weight,
    out,
    x_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if EARLY:
        let_next_start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(DEPENDENT, LET_NEXT_START=not EARLY)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, normalized(value, scale, eps, WIDTH, out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, early: bool = False) -> Tensor:
    """`kernels.norm.rms_norm` for a CUDA tensor [T, H] whose last dimension is contiguous.

    early: the next kernel may start at once, since it has much to load before it waits (`kernels.cuda.triton_launch`).
    """
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    if rows:
        _rms_norm_kernel[(rows,)](
            x,
            weight,
            out,
            x.stride(0),
            eps,
            WIDTH=width,
            BLOCK=block,
            EARLY=early,
            num_warps=min(max(block // 256, 1), 16),
            **dependent(x.device),
        )
    return out
