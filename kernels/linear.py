"""The linear layers of a transformer block, each with the norm, bias, gated activation or residual next to it, so that
a device may fuse them. Weights have the shape that F.linear takes, [out, in]. They may be 8-bit floats (`kernels.fp8`)
or, on a CPU, packed (`kernels.packed`)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kernels import fp8, packed
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
    return silu_mul(norm_linear(hidden, norm, eps, gate_up, None))


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
    """x @ weight.T + bias. x [T, K]; weight [N, K]; bias [N] or None. Returns [T, N] in x's dtype."""
    if isinstance(weight, Fp8Weight):
        return fp8.linear(x, weight, bias)
    return packed.linear(x, weight, bias) if weight.is_mkldnn else F.linear(x, weight, bias)
