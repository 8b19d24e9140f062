"""The linear layers of a transformer block with what stands before or after each of them, so that a device may do it in
one pass: norm, bias, gated activation, residual. Weights are laid out as F.linear takes them, [out, in]."""

import torch.nn.functional as F
from torch import Tensor

from kernels.activation import silu_mul
from kernels.norm import rms_norm


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(rms_norm(x)).

    x [T, H]; norm [H]; weight [N, H]; bias [N] or None; one dtype. Returns [T, N].
    """
    return F.linear(rms_norm(x, norm, eps), weight, bias)


def norm_gated_linear(x: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> Tensor:
    """silu(gate(rms_norm(x))) * up(rms_norm(x)).

    x [T, H]; norm [H]; gate_up [2 I, H]: gate in the first half, up in the second; one dtype. Returns [T, I].
    """
    return silu_mul(F.linear(rms_norm(x, norm, eps), gate_up))


def add_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Adds linear(x) to `residual`, in place, and returns it.

    residual [T, H], contiguous; x [T, K]; weight [H, K]; bias [H] or None; one dtype.
    """
    return residual.add_(F.linear(x, weight, bias))
