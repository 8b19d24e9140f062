"""Kernels of 8-bit floats against `kernels.fp8`; test modules and `tests/gpu` choose the shapes."""

import torch
from torch import Tensor

from kernels import activation, experts, fp8, norm
from kernels.cuda import triton_experts, triton_fp8, triton_fp8_experts
from kernels.cuda.triton_grouped import Choices
from kernels.fp8 import E4M3, GROUP, Fp8Weight
from kernels.hidden import Hidden
from tests.kernels.checks import poison
from tests.kernels.inputs import DEVICE, INTERPRETED, ROUNDED_TOLERANCE, TOLERANCE, assert_close, randn

if not INTERPRETED and torch.cuda.get_device_capability() < (8, 9):
    raise ImportError("this GPU has no 8-bit floats")

# of the relative norm, where sums of products of 8-bit floats are compared: a GPU adds them up with 14 bits
SUMS_TOLERANCE = {dtype: tolerance if INTERPRETED else max(tolerance, 1e-3) for dtype, tolerance in TOLERANCE.items()}


def dequantized(quantized: triton_fp8.Quantized) -> Tensor:
    """Of the tokens, without what rows are padded with."""
    tokens = quantized.tokens
    return fp8.dequantize(quantized.values[:tokens], quantized.scales[:tokens]).double()


def check_quantize(rows: int, width: int, group: int, before: str, dtype: torch.dtype) -> None:
    """x is a part of wider rows. One of them is zero, and one has a huge value. before: "", "norm" or "gate"."""
    gated = before == "gate"
    x = randn(rows, 2 * width + 16, dtype=dtype, seed=1)[:, : width * (2 if gated else 1)]
    x[rows // 2] = 0
    x[-1, width // 3] = 500 if gated else 60_000
    weight = randn(width, dtype=dtype, seed=2) if before == "norm" else None
    padded = -(-rows // 8) * 8
    poison(padded * width // 4, torch.float32)
    poison(padded * width // group, torch.float32)
    actual = triton_fp8.quantize(x, group, weight, 1e-5, gated=gated)
    assert actual.tokens == rows
    assert actual.values.shape == (padded, width)
    assert actual.values.dtype == E4M3
    assert actual.scales.shape == (padded, width // group)
    assert actual.scales.stride() == (1, padded)

    wide = x.double()
    if gated:
        wide = activation.silu_mul(wide)
    elif weight is not None:
        wide = norm.rms_norm(wide, weight.double(), 1e-5)
    limits = torch.finfo(dtype)
    rounding, smallest = (2 * limits.eps, 4 * limits.tiny * limits.eps) if before else (1e-6, 0.0)
    expected = wide.unflatten(1, (-1, group))
    scales = expected.abs().amax(-1).clamp(min=fp8.SMALLEST) / fp8.LARGEST
    torch.testing.assert_close(actual.scales[:rows].double(), scales, rtol=3 * rounding, atol=0)
    # half the distance of two 8-bit floats, which is 2^-9 or more
    room = torch.maximum(expected.abs() * 2**-4, scales.unsqueeze(-1) * 2**-10) * (1 + 32 * rounding)
    error = (dequantized(actual).view(expected.shape) - expected).abs()
    assert bool((error <= room + expected.abs() * rounding + smallest).all())  # NaN fails too
    if not before:
        values, reference_scales = fp8.quantize(x, group)
        torch.testing.assert_close(actual.scales[:rows], reference_scales, rtol=1e-6, atol=0)
        assert (actual.values[:rows].float() != values.float()).double().mean() <= 1e-3  # a GPU's division rounds


def check_quantize_of_bad_values(width: int, group: int, with_norm: bool, bad: float) -> None:
    """Where a group has a NaN or an infinity, it has a NaN afterwards; other rows are as ever."""
    x = randn(4, width, seed=1)
    weight = randn(width, seed=2) if with_norm else None
    expected = dequantized(triton_fp8.quantize(x, group, weight, 1e-5))
    x[1, width // 2] = x[3, 0] = bad
    actual = dequantized(triton_fp8.quantize(x, group, weight, 1e-5))
    assert torch.equal(actual[::2], expected[::2])
    groups = (x if weight is None else norm.rms_norm(x, weight, 1e-5)).unflatten(1, (-1, group))
    assert torch.equal(actual.view(groups.shape).isnan().any(-1), groups.isfinite().logical_not().any(-1))


def stack(count: int, outputs: int, inputs: int, in_blocks: bool, seed: int) -> Fp8Weight:
    """Random matrices whose scales differ, and whose products are about as large as what they are multiplied by."""
    values = (randn(count, outputs, inputs, seed=seed) * 64).clamp(-fp8.LARGEST, fp8.LARGEST).to(E4M3)
    shape = (count, outputs // GROUP, inputs // GROUP) if in_blocks else (count, outputs, 1)
    scales = randn(*shape, seed=seed + 100).abs().add_(0.1) / (64 * inputs**0.5)
    return Fp8Weight(values, scales)


def choose(tokens: int, count: int, per_token: int, used: int | None) -> tuple[Tensor, Tensor]:
    """`used`: only so many of the experts are chosen."""
    scores = randn(tokens, count, seed=6)
    scores[:, used or count :] = -torch.inf
    return experts.choose(scores, per_token, True)


def check_grouped(
    tokens: int,
    outputs: int,
    inputs: int,
    count: int,
    per_token: int,
    in_blocks: bool,
    dtype: torch.dtype,
    used: int | None = None,
) -> None:
    """Both kinds of product, by themselves. One token is NaN."""
    shares, chosen = choose(tokens, count, per_token, used)
    choices = Choices(shares, *triton_experts.sort(chosen.int(), count))
    order = choices.order.long()
    expert, token = chosen.flatten()[order], order // per_token
    group = GROUP if in_blocks else inputs
    nan = tokens // 2

    for gated in (True, False):
        weight = stack(count, outputs * (1 + gated), inputs, in_blocks, seed=1)
        x = randn(tokens if gated else tokens * per_token, inputs, dtype=dtype, seed=4)
        x[nan if gated else token == nan, inputs // 2] = torch.nan
        quantized = triton_fp8.quantize(x, group)
        rows = dequantized(quantized)[token] if gated else dequantized(quantized)
        products = torch.empty(len(rows), weight.shape[1], dtype=torch.float64, device=DEVICE)
        for number in range(count):
            matrix = fp8.dequantize(weight.values[number], weight.scales[number]).double()
            products[expert == number] = rows[expert == number] @ matrix.T
        expected = activation.silu_mul(products) if gated else products * shares.flatten()[order, None]
        poison(expected.numel(), dtype)
        out = torch.empty(expected.shape, dtype=dtype, device=DEVICE)
        actual = triton_fp8_experts.grouped(quantized, weight, choices, out, gated)
        actual = actual if gated else actual[order]
        bad = token == nan
        assert bool(actual[bad].isnan().all())
        if not bool(bad.all()):
            assert_close(actual[~bad], expected[~bad], SUMS_TOLERANCE[dtype])


def check_mix(
    tokens: int,
    hidden: int,
    intermediate: int,
    count: int,
    per_token: int,
    in_blocks: bool,
    dtype: torch.dtype,
    used: int | None = None,
) -> None:
    """Both products, one after the other."""
    gate_up = stack(count, 2 * intermediate, hidden, in_blocks, seed=1)
    down = stack(count, hidden, intermediate, in_blocks, seed=2)
    x, states = (randn(tokens, hidden, dtype=dtype, seed=seed) for seed in (4, 5))
    shares, chosen = choose(tokens, count, per_token, used)
    expected = states.double() + experts.mix(x.float(), shares, chosen, gate_up, down)
    poison(tokens * per_token * hidden, dtype)
    weights = experts.Experts(randn(count, hidden, dtype=dtype), gate_up, down, per_token, True)
    triton_experts.add_mix(states, x, shares, chosen.int(), weights)
    assert_close(states, expected, ROUNDED_TOLERANCE)


def check_add_experts(tokens: int, normalized: bool, in_blocks: bool, dtype: torch.dtype) -> None:
    """The first feature makes two experts the best ones, so that no rounding of scores can choose others."""
    count, hidden, intermediate = 4, 256, 128
    gate_up = stack(count, 2 * intermediate, hidden, in_blocks, seed=1)
    down = stack(count, hidden, intermediate, in_blocks, seed=2)
    router = randn(count, hidden, dtype=dtype, seed=3).div_(8 * hidden**0.5)
    norm_weight, states = randn(hidden, dtype=dtype, seed=4), randn(tokens, hidden, dtype=dtype, seed=5)
    router[1:3, 0] = norm_weight[0] = states[:, 0] = 1
    weights = experts.Experts(router.float(), gate_up, down, 2, normalized)
    expected = experts.add_experts(Hidden(states.float()), norm_weight.float(), 1e-5, weights).states
    weights = experts.Experts(router, gate_up, down, 2, normalized)
    added = triton_experts.add_experts(Hidden(states), norm_weight, 1e-5, weights)
    assert added.states.data_ptr() == states.data_ptr()
    assert_close(added.states, expected, ROUNDED_TOLERANCE)
