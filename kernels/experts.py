"""A mixture of experts in place of an MLP: each token goes through a few of many (Shazeer et al., "Outrageously Large
Neural Networks", 2017; Jiang et al., "Mixtral of Experts", 2024)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activation import silu_mul
from kernels.fp8 import Weight
from kernels.hidden import Hidden
from kernels.linear import product
from kernels.norm import rms_norm


@dataclass(frozen=True, slots=True)
class Experts:
    """Weights of E experts, each an MLP with I intermediate values, and of the router that chooses among them."""

    router: Tensor  # [E, H]
    gate_up: Weight  # [E, 2 I, H]: gate, up
    down: Weight  # [E, H, I]
    per_token: int  # how many each token goes through
    normalized: bool  # whether the shares of a token's experts add up to 1


def add_experts(hidden: Hidden, norm: Tensor, eps: float, experts: Experts) -> Hidden:
    """Adds the output of the mixture for rms_norm(hidden) to the hidden states, in place.

    hidden [T, H]; norm [H]; of the experts' dtype.
    """
    normed = rms_norm(hidden.states, norm, eps)
    shares, chosen = choose(F.linear(normed, experts.router), experts.per_token, experts.normalized)
    return Hidden(hidden.states.add_(mix(normed, shares, chosen, experts.gate_up, experts.down)))


def choose(scores: Tensor, per_token: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """The experts with the highest scores [T, E], and their shares, which are softmaxes over all scores.

    Returns (shares [T, per_token] float32, experts [T, per_token] int64).
    """
    shares, chosen = scores.softmax(-1, dtype=torch.float32).topk(per_token)
    if normalized:
        shares /= shares.sum(-1, keepdim=True)
    return shares, chosen


def mix(x: Tensor, shares: Tensor, chosen: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """Each token's sum of share * down(silu(gate(x)) * up(x)) over the experts chosen for it.

    x [T, H]; shares, chosen [T, k]; gate_up [E, 2 I, H]; down [E, H, I]. Returns [T, H] in x's dtype, summed in that of
    the shares or of x, whichever is wider.
    """
    mixed = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, shares.dtype))
    for expert in sorted(set(chosen.flatten().tolist())):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        output = product(silu_mul(product(x[token], gate_up[expert])), down[expert])
        mixed.index_add_(0, token, (output * shares[token, place, None]).to(mixed.dtype))
    return mixed.to(x.dtype)
