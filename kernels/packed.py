"""Weights in oneDNN's own layout, in which a CPU multiplies with them fastest.

A product of a few tokens takes a half to three quarters of the time that F.linear takes with a plain matrix, if the CPU
has AVX-512, and one of hundreds nine tenths (docs/benchmarks.md). Without AVX-512 it is two thirds to nine tenths, but
one token takes a quarter longer: so the plain matrix is kept for that. torch packs weights with these functions when it
compiles a model for a CPU; it has no public ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(weight: Tensor, *, may_keep: bool = False) -> Tensor:
    """A copy of weight [N, K] for `linear`; `to_dense` gives its values. The weight itself if this CPU has no packed
    layout for its dtype, or if it is not on a CPU.

    Args:
        may_keep: there is memory for the weight beside its copy, where that makes one token faster.
    """
    if not _can_be_packed(weight):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    if may_keep and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        packed.plain = weight  # type: ignore[attr-defined]
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias), where `packed` is `pack(weight)`. x [T, K]; bias [N] or None. Returns [T, N].

    oneDNN compiles code for each T, which takes 2 ms and 0.7 MB that it keeps. So x gets rows of zeros up to the next
    of some sixty sizes.
    """
    tokens = x.shape[0]
    if tokens == 1 and (plain := getattr(packed, "plain", None)) is not None:
        return F.linear(x, plain, bias)
    if missing := _padded(tokens) - tokens:
        x = F.pad(x, (0, 0, 0, missing))
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product[:tokens]


def _padded(tokens: int) -> int:
    """The next size: up to 16 all are, above that every sixteenth to eighth."""
    step = 1 << max(tokens.bit_length() - 4, 0)
    return -(-tokens // step) * step


def _can_be_packed(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False  # on other CPUs this was never tried
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
