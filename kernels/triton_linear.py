"""Linear layers on CUDA, each by the fastest of five: the kernel of few rows, the one that streams its weight, that of
gate and up, tiles, or the library's product with norm and activation in launches of their own. `kernels.linear` holds
the references."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from kernels import triton_few_rows
from kernels.triton_activation import silu_mul
from kernels.triton_few_rows import few_rows_linear
from kernels.triton_launch import is_hopper
from kernels.triton_norm import rms_norm
from kernels.triton_tiled_linear import suits_tiles, tiled_linear

# Measured on an H100 (docs/kernels.md): elements of a weight up to which own kernels are faster than the library's at
# any number of rows that they take; and rows of such a weight, up to which it is best taken as few, and streamed.
_SMALL_WEIGHT = 1 << 23
_FEW_ROWS = 2
_STREAMED_ROWS = 32


def _is_small(weight: Tensor) -> bool:
    return weight.numel() <= _SMALL_WEIGHT


def _few(x: Tensor, weight: Tensor, *, gated: bool = False) -> bool:
    rows = x.shape[0]
    best, most = (_FEW_ROWS, triton_few_rows.MAX_ROWS) if _is_small(weight) else (0, 1)
    return 0 < rows <= best or (0 < rows <= most and not _streams(x, weight, gated=gated))


def _streams(x: Tensor, weight: Tensor, *, gated: bool = False) -> bool:
    if not is_hopper(x.device) or (x.shape[0] > _STREAMED_ROWS and _is_small(weight)):
        return False
    from kernels.streamed_linear import suits_stream  # needs CUDA's bindings, which Triton's interpreter does without

    return suits_stream(x, weight, gated=gated)


def _gates(x: Tensor, gate_up: Tensor) -> bool:
    if not is_hopper(x.device) or _is_small(gate_up):
        return False
    from kernels.gated_linear import suits_gated

    return suits_gated(x, gate_up)


def _own_product(x: Tensor, weight: Tensor, *, gated: bool = False) -> Callable[..., Tensor] | None:
    """`streamed_linear` or `tiled_linear`, which are called alike; None: the library's is faster."""
    if _streams(x, weight, gated=gated):
        from kernels.streamed_linear import streamed_linear

        return streamed_linear
    return tiled_linear if _is_small(weight) and suits_tiles(x, weight) else None


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.linear.norm_linear` for CUDA tensors; x's last dimension and the weight are contiguous."""
    if _few(x, weight):
        return few_rows_linear(x, weight, norm=norm, eps=eps, bias=bias)
    normed = rms_norm(x, norm, eps, early=_streams(x, weight))
    if (product := _own_product(normed, weight)) is not None:
        return product(normed, weight, bias=bias)
    return F.linear(normed, weight, bias)


def norm_gated_linear(x: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> Tensor:
    """`kernels.linear.norm_gated_linear` for CUDA tensors; x's last dimension and gate_up are contiguous."""
    if _few(x, gate_up, gated=True):
        return few_rows_linear(x, gate_up, norm=norm, eps=eps, gated=True)
    normed = rms_norm(x, norm, eps, early=_streams(x, gate_up, gated=True) or _gates(x, gate_up))
    if (product := _own_product(normed, gate_up, gated=True)) is not None:
        return product(normed, gate_up, gated=True)
    if _gates(normed, gate_up):
        from kernels.gated_linear import gated_linear

        return gated_linear(normed, gate_up)
    return silu_mul(F.linear(normed, gate_up))


def add_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.linear.add_linear` for CUDA tensors; x's last dimension and the weight are contiguous."""
    if _few(x, weight):
        return few_rows_linear(x, weight, bias=bias, residual=residual)
    if (product := _own_product(x, weight)) is not None:
        return product(x, weight, bias=bias, residual=residual)
    residual.addmm_(x, weight.t())
    if bias is not None:
        residual.add_(bias)
    return residual
