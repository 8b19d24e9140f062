"""The linear layers of a transformer block, each with the norm, bias, gated activation or residual next to it, so that
a device may fuse them. Weights have the layout of F.linear, [out, in], and may be 8-bit floats (`kernels.fp8`)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import fp8
from kernels.activation import silu_mul
from kernels.fp8 import Fp8Weight, Weight
from kernels.hidden import Hidden
from kernels.norm import rms_norm


@dataclass(frozen=True, slots=True)
class Mlp:
    gate_up: Weight  # [2 I, H]: gate, up; I: intermediate size
    down: Weight  # [H, I]


def norm_linear(hidden: Hidden, norm: Tensor, eps: float, weight: Weight, bias: Tensor | None) -> Tensor:
    """linear(rms_norm(hidden)).

    hidden [T, H]; norm [H]; weight [N, H]; bias [N] or None; one dtype. Returns [T, N].
    """
    return product(rms_norm(hidden.states, norm, eps), weight, bias)


def norm_gated_linear(hidden: Hidden, norm: Tensor, eps: float, gate_up: Weight) -> Tensor:
    """silu(gate(rms_norm(hidden))) * up(rms_norm(hidden)).

    hidden [T, H]; norm [H]; gate_up [2 I, H]: gate in the first half, up in the second; one dtype. Returns [T, I].
    """
    normed = rms_norm(hidden.states, norm, eps)
    if isinstance(gate_up, Tensor) and normed.device.type == "cpu" and not _is_quicker_transposed(normed, gate_up):
        # two products of half the width are a little faster than one
        gate, up = (product(normed, half) for half in gate_up.chunk(2))
        return F.silu(gate, inplace=True).mul_(up)
    return silu_mul(product(normed, gate_up))


def add_linear(hidden: Hidden, x: Tensor, weight: Weight, bias: Tensor | None, next_norm: Tensor | None) -> Hidden:
    """Adds linear(x) to the hidden states, in place.

    hidden [T, H]; x [T, K]; weight [H, K]; bias and next_norm [H] or None; one dtype. next_norm: weight of the norm
    that comes next, which an implementation may begin (`kernels.hidden.BegunNorm`). None: no norm follows.
    """
    return Hidden(hidden.states.add_(product(x, weight, bias)))


def add_mlp(hidden: Hidden, norm: Tensor, eps: float, mlp: Mlp, next_norm: Tensor | None) -> Hidden:
    """Adds down(silu(gate(rms_norm(hidden))) * up(rms_norm(hidden))) to the hidden states, in place.

    hidden [T, H]; norm [H]; next_norm: as in `add_linear`.
    """
    return add_linear(hidden, norm_gated_linear(hidden, norm, eps, mlp.gate_up), mlp.down, None, next_norm)


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, by the function that is fastest for this shape."""
    if isinstance(weight, Fp8Weight):
        return fp8.linear(x, weight, bias)
    if x.shape[0] == 1 and _is_float32_on_cpu(x):
        # F.linear would take the matrix product, which for one row takes up to twice as long.
        row = weight.mv(x[0]) if bias is None else torch.addmv(bias, weight, x[0])
        return row.unsqueeze(0)
    if _is_quicker_transposed(x, weight):
        transposed = (weight @ x.t()).t().contiguous()
        return transposed if bias is None else transposed.add_(bias)
    return F.linear(x, weight, bias)


def _is_quicker_transposed(x: Tensor, weight: Tensor) -> bool:
    """Whether a CPU computes weight @ x.T faster than x @ weight.T. MKL's sgemm does, by up to a factor of two, for few
    rows and a matrix with many more outputs than inputs, such as the vocabulary's."""
    outputs, inputs = weight.shape
    return 1 < x.shape[0] <= 8 and outputs >= 4 * inputs and _is_float32_on_cpu(x)


def _is_float32_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32
