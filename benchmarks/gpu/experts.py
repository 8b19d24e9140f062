"""Cases of `benchmarks.gpu.kernels`: a mixture of experts of Qwen3-30B-A3B's shape, in 16 and in 8 bits."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.fp8 import in_blocks
from benchmarks.gpu.graph_timing import graph_microseconds
from benchmarks.gpu.results import DEVICE, DTYPE, Ceilings, Result, randn, relative_error
from kernels import experts, norm
from kernels.cuda import triton_activation, triton_experts, triton_norm
from kernels.experts import Experts
from kernels.fp8 import Fp8Weight, Weight
from kernels.hidden import Hidden

INPUTS = 8  # that are rotated through, with other experts for each


def mixtures(ceilings: Ceilings) -> Iterator[Result]:
    hidden, intermediate, count, per_token = 2048, 768, 128, 8
    gate_up = randn(count, 2 * intermediate, hidden) * hidden**-0.5
    down = randn(count, hidden, intermediate) * intermediate**-0.5
    router = randn(count, hidden) * hidden**-0.5
    weights = Experts(router, gate_up, down, per_token, normalized=True)
    in_8_bits = replace(weights, gate_up=in_blocks(gate_up), down=in_blocks(down))
    for tokens in (1, 16, 64, 256, 1024, 8192):
        case = f"30B-A3B {tokens} tokens"
        x = randn(INPUTS, tokens, hidden)
        floor = floor_microseconds(ceilings, x, weights)
        yield mixture("norm, router and experts", case, x, weights, floor, 1e-2)
        microseconds = grouped_mm_microseconds(x, router, gate_up, down, per_token)
        yield Result("  torch's grouped_mm", case, None, microseconds, floor)
        floor = floor_microseconds(ceilings, x, in_8_bits)
        # now and then a value is rounded to another 8-bit float than the reference's, since it was rounded to 16 bits
        yield mixture("  weights of 8 bits", case, x, in_8_bits, floor, 3e-2)


def floor_microseconds(ceilings: Ceilings, x: Tensor, weights: Experts) -> float:
    """To read the experts chosen, or to multiply with them, whichever is longer; 8-bit floats are multiplied twice as
    fast."""
    _, tokens, hidden = x.shape
    scale = torch.ones(hidden, dtype=x.dtype, device=x.device)
    _, chosen = experts.choose(F.linear(norm.rms_norm(x, scale, 1e-6), weights.router), weights.per_token, True)
    used = sum(len(set(part.flatten().tolist())) for part in chosen) / len(x)
    matrices = [weights.gate_up[0], weights.down[0]]
    operations = 2 * tokens * weights.per_token * sum(matrix.shape.numel() for matrix in matrices)
    rate = 2 if isinstance(weights.gate_up, Fp8Weight) else 1
    return max(ceilings.moving(used * sum(map(weight_bytes, matrices))), ceilings.computing(operations / rate))


def weight_bytes(weight: Weight) -> int:
    return weight.values.nbytes + weight.scales.nbytes if isinstance(weight, Fp8Weight) else weight.nbytes


def mixture(kernel: str, case: str, x: Tensor, weights: Experts, floor: float, tolerance: float) -> Result:
    """All from the norm to the residual; the error is that of the products."""
    scale = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    scores = F.linear(norm.rms_norm(x[0], scale, 1e-6), weights.router)
    shares, chosen = experts.choose(scores, weights.per_token, True)
    mixed = torch.zeros_like(x[0])
    triton_experts.add_mix(mixed, x[0], shares, chosen.int(), weights)
    expected = experts.mix(x[0].float(), shares, chosen, widened(weights.gate_up), widened(weights.down))
    calls = [partial(triton_experts.add_experts, Hidden(part), scale, 1e-6, weights) for part in x.clone()]
    return Result(kernel, case, relative_error(mixed, expected), graph_microseconds(calls), floor, tolerance)


def widened(weight: Weight) -> Weight:
    return weight if isinstance(weight, Fp8Weight) else weight.float()


def grouped_mm_microseconds(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, per_token: int) -> float:
    """The same with torch's grouped product."""
    scale = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)

    def mix(part: Tensor, added: Tensor) -> Tensor:
        normed = triton_norm.rms_norm(part, scale, 1e-6)
        shares, chosen = experts.choose(F.linear(normed, router), per_token, True)
        ordered, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(ordered, torch.arange(len(router), device=DEVICE), right=True).int()
        token = order // per_token
        activated = triton_activation.silu_mul(F.grouped_mm(normed[token], gate_up.transpose(1, 2), offs=ends))
        parts = F.grouped_mm(activated, down.transpose(1, 2), offs=ends)
        return added.index_add_(0, token, (parts * shares.flatten()[order, None]).to(DTYPE))

    return graph_microseconds([partial(mix, part, added) for part, added in zip(x, x.clone(), strict=True)])
