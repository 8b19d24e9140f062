"""The gated activation of Llama's MLP (SwiGLU: Shazeer, "GLU Variants Improve Transformer", 2020)."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    gate_up [T, 2I]: gate in the first half, up in the second. Returns [T, I] of the same dtype.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
