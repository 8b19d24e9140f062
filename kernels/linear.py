"""The linear layers of a transformer block with what stands before or after each of them, so that a device may do it in
one pass: norm, bias, gated activation, residual. Weights are laid out as F.linear takes them, [out, in]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activation import silu_mul
from kernels.norm import rms_norm


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(rms_norm(x)).

    x [T, H]; norm [H]; weight [N, H]; bias [N] or None; one dtype. Returns [T, N].
    """
    normed = rms_norm(x, norm, eps)
    if _is_quicker_transposed(normed, weight):
        product = (weight @ normed.t()).t().contiguous()
        return product if bias is None else product.add_(bias)
    return F.linear(normed, weight, bias)


def norm_gated_linear(x: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> Tensor:
    """silu(gate(rms_norm(x))) * up(rms_norm(x)).

    x [T, H]; norm [H]; gate_up [2 I, H]: gate in the first half, up in the second; one dtype. Returns [T, I].
    """
    normed = rms_norm(x, norm, eps)
    if _is_quicker_transposed(normed, gate_up):
        return silu_mul((gate_up @ normed.t()).t().contiguous())
    if normed.device.type == "cpu":
        # two products of half the width are a little quicker than one
        gate, up = (F.linear(normed, half) for half in gate_up.chunk(2))
        return F.silu(gate, inplace=True).mul_(up)
    return silu_mul(F.linear(normed, gate_up))


def add_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Adds linear(x) to `residual`, in place, and returns it.

    residual [T, H], contiguous; x [T, K]; weight [H, K]; bias [H] or None; one dtype.
    """
    return residual.add_(F.linear(x, weight, bias))


def _is_quicker_transposed(x: Tensor, weight: Tensor) -> bool:
    """Whether a CPU computes weight @ x.T in less time than x @ weight.T: in float32 up to twice as fast (MKL's sgemm),
    where few rows meet a matrix with many more outputs than inputs, such as the vocabulary's."""
    outputs, inputs = weight.shape
    return x.device.type == "cpu" and x.dtype == torch.float32 and 1 < x.shape[0] <= 8 and outputs >= 4 * inputs
