"""Linear layers with weights of 8-bit floats on Hopper GPUs: `streamed_linear` for few tokens, else cuBLAS;
`kernels.linear` holds the references."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from kernels.cuda.streamed_linear import add_streamed_linear, streamed_linear, suits_stream
from kernels.cuda.triton_fp8 import Quantized, quantize
from kernels.fp8 import Fp8Weight
from kernels.hidden import Hidden

_SCALES_ALIGNED = 4  # in a row of the scales of blocks, as cuBLAS wants them


def norm_linear(hidden: Hidden, norm: Tensor, eps: float, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
    """`kernels.linear.norm_linear` for CUDA tensors whose last dimensions are contiguous."""
    states = hidden.states
    streams = suits_stream(states, weight)
    x = quantize(states, weight.group, norm, eps, early=streams)
    if streams:
        return streamed_linear(x, weight, bias=bias)
    product = _product(x, weight)
    return product if bias is None else product.add_(bias)


def add_linear(hidden: Hidden, x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Hidden:
    """`kernels.linear.add_linear` for CUDA tensors whose last dimensions are contiguous."""
    states = hidden.states
    streams = suits_stream(x, weight)
    quantized = quantize(x, weight.group, early=streams)
    if streams:
        return add_streamed_linear(states, quantized, weight, bias, None)
    states.add_(_product(quantized, weight))
    return Hidden(states if bias is None else states.add_(bias))


def add_mlp(hidden: Hidden, norm: Tensor, eps: float, gate_up: Fp8Weight, down: Fp8Weight) -> Hidden:
    """`kernels.linear.add_mlp` for CUDA tensors whose last dimensions are contiguous."""
    states = hidden.states
    streams = suits_stream(states, gate_up, gated=True)
    x = quantize(states, gate_up.group, norm, eps, early=streams)
    if streams:
        return add_linear(hidden, streamed_linear(x, gate_up, gated=True), down, None)
    both = _product(x, gate_up)
    streams = suits_stream(both[:, : down.shape[1]], down)
    activated = quantize(both, down.group, gated=True, early=streams)
    if streams:
        return add_streamed_linear(states, activated, down, None, None)
    return Hidden(states.add_(_product(activated, down)))


def _product(x: Quantized, weight: Fp8Weight) -> Tensor:
    scales, kinds = weight.scales, (ScalingType.RowWise, ScalingType.RowWise)
    if weight.in_blocks:
        kinds = (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
        if odd := scales.shape[1] % _SCALES_ALIGNED:
            scales = F.pad(scales, (0, _SCALES_ALIGNED - odd))
    product = F.scaled_mm(
        x.values,
        weight.values.t(),
        x.scales,
        kinds[0],
        scales.t(),
        kinds[1],
        output_dtype=x.dtype,
        use_fast_accum=not weight.in_blocks,
    )
    return product[: x.tokens]
