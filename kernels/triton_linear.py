"""Linear layers on CUDA, each by the fastest of three: the kernel of few rows, tiles, or the library's product with
norm and activation in launches of their own. `kernels.linear` holds the references."""

import torch.nn.functional as F
from torch import Tensor

from kernels import triton_few_rows
from kernels.triton_activation import silu_mul
from kernels.triton_few_rows import few_rows_linear
from kernels.triton_norm import rms_norm
from kernels.triton_tiled_linear import suits_tiles, tiled_linear

# Elements of a weight up to which own kernels are faster than the library's at more than one row, measured on an H100
# (docs/kernels.md).
_SMALL_WEIGHT = 1 << 23


def _few(x: Tensor, weight: Tensor) -> bool:
    rows = x.shape[0]
    return rows == 1 or (1 < rows <= triton_few_rows.MAX_ROWS and weight.numel() <= _SMALL_WEIGHT)


def _tiled(x: Tensor, weight: Tensor) -> bool:
    return weight.numel() <= _SMALL_WEIGHT and suits_tiles(x, weight)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.linear.norm_linear` for CUDA tensors; x's last dimension and the weight are contiguous."""
    if _few(x, weight):
        return few_rows_linear(x, weight, norm=norm, eps=eps, bias=bias)
    normed = rms_norm(x, norm, eps)
    if _tiled(normed, weight):
        return tiled_linear(normed, weight, bias=bias)
    return F.linear(normed, weight, bias)


def norm_gated_linear(x: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> Tensor:
    """`kernels.linear.norm_gated_linear` for CUDA tensors; x's last dimension and gate_up are contiguous."""
    if _few(x, gate_up):
        return few_rows_linear(x, gate_up, norm=norm, eps=eps, gated=True)
    normed = rms_norm(x, norm, eps)
    if _tiled(normed, gate_up):
        return tiled_linear(normed, gate_up, gated=True)
    return silu_mul(F.linear(normed, gate_up))


def add_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.linear.add_linear` for CUDA tensors; x's last dimension and the weight are contiguous. The kernel before
    this one, which may still run, must not write `residual`; it may write x."""
    if _few(x, weight):
        return few_rows_linear(x, weight, bias=bias, residual=residual)
    if _tiled(x, weight):
        return tiled_linear(x, weight, bias=bias, residual=residual)
    residual.addmm_(x, weight.t())
    if bias is not None:
        residual.add_(bias)
    return residual
