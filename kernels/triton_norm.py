# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""RMS norm on CUDA, one program a row; `kernels.norm` holds the references and the formula."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    new_residual,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(new_residual.dtype.element_ty)
        tl.store(new_residual + row * WIDTH + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value) / WIDTH + eps)
    dtype = out.dtype.element_ty
    tl.store(out + row * WIDTH + column, (normed.to(dtype).to(tl.float32) * scale).to(dtype), mask=inside)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    new_residual = out if residual is None else torch.empty_like(out)
    block = triton.next_power_of_2(width)
    if rows:
        _rms_norm_kernel[(rows,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            new_residual,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            WIDTH=width,
            ADD=residual is not None,
            BLOCK=block,
            num_warps=min(max(block // 256, 1), 16),
        )
    return out, new_residual


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.norm.rms_norm` for CUDA tensors whose last dimension is contiguous."""
    return _launch(x.reshape(-1, x.shape[-1]), None, weight, eps)[0].view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`kernels.norm.add_rms_norm` for CUDA tensors whose last dimension is contiguous; one launch, new tensors."""
    return _launch(x, residual, weight, eps)
