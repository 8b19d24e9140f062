"""Root-mean-square normalisation (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x [..., H]; weight [H], same dtype. The normalised value is computed in float32 and rounded to x's dtype before it
    is multiplied, as transformers does. Returns x's shape and dtype.
    """
    if x.dtype == torch.float32:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
