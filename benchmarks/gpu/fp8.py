"""Cases of `benchmarks.gpu.kernels`: the products of a layer of Llama-3.1-8B's shape, in 16 and in 8 bits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.gpu.graph_timing import graph_microseconds
from benchmarks.gpu.results import DEVICE, DTYPE, Ceilings, Result, randn, relative_error
from kernels import linear
from kernels.cuda import fastest_linear
from kernels.fp8 import E4M3, GROUP, LARGEST, Fp8Weight, Weight
from kernels.hidden import Hidden
from kernels.linear import Mlp

HIDDEN, QKV, INTERMEDIATE = 4096, 6144, 14_336
PARAMETERS = HIDDEN * (QKV + HIDDEN + 3 * INTERMEDIATE)
EPS = 1e-6
NORM = torch.ones(HIDDEN, dtype=DTYPE, device=DEVICE)
LAYERS = 2  # one after the other: more than the L2 cache holds


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: Weight
    output: Weight
    mlp: Mlp


def products(ceilings: Ceilings) -> Iterator[Result]:
    """Norms, residuals and activation included, attention not. The floor is the time to read the weights, or to
    multiply with them, whichever is longer; 8-bit floats are multiplied twice as fast."""
    kinds: list[tuple[str, int, float, Callable[[Tensor], Weight]]] = [
        ("16 bits", DTYPE.itemsize, 1e-2, lambda weight: weight),
        # now and then a value is rounded to another 8-bit float than the reference's, since it was rounded to 16 bits
        ("8 bits, by output", 1, 3e-2, by_output),
        ("8 bits, in blocks", 1, 3e-2, in_blocks),
    ]
    for kind, itemsize, tolerance, quantized in kinds:
        layers = [random_layer(quantized) for _ in range(LAYERS)]
        for tokens in (1, 8, 32, 64, 96, 128, 256, 512, 2048, 8192):
            states, attended = randn(tokens, HIDDEN), randn(tokens, HIDDEN)
            ours, theirs = (run(module, layers[0], states.clone(), attended) for module in (fastest_linear, linear))
            calls = [partial(run, fastest_linear, layer, states.clone(), attended) for layer in layers]
            floor = max(
                ceilings.moving(PARAMETERS * itemsize),
                ceilings.computing(2 * tokens * PARAMETERS * itemsize / DTYPE.itemsize),
            )
            error = relative_error(ours, theirs)
            yield Result(
                f"products of a layer, {kind}", f"8B {tokens}", error, graph_microseconds(calls), floor, tolerance
            )


def random_layer(quantized: Callable[[Tensor], Weight]) -> Layer:
    def weight(outputs: int, inputs: int) -> Weight:
        return quantized(randn(outputs, inputs) * inputs**-0.5)

    mlp = Mlp(weight(2 * INTERMEDIATE, HIDDEN), weight(HIDDEN, INTERMEDIATE))
    return Layer(weight(QKV, HIDDEN), weight(HIDDEN, HIDDEN), mlp)


def run(ops: ModuleType, layer: Layer, states: Tensor, attended: Tensor) -> Tensor:
    """q, k and v are computed for nothing: attention is left out."""
    hidden = Hidden(states)
    ops.norm_linear(hidden, NORM, EPS, layer.qkv, None)
    hidden = ops.add_linear(hidden, attended, layer.output, None, NORM)
    added: Tensor = ops.add_mlp(hidden, NORM, EPS, layer.mlp, NORM).states
    return added


def by_output(weight: Tensor) -> Fp8Weight:
    scales = weight.abs().amax(1, keepdim=True).float() / LARGEST
    return Fp8Weight((weight / scales).to(E4M3), scales)


def in_blocks(weight: Tensor) -> Fp8Weight:
    """A matrix [N, K], or a stack of them, quantized with a scale for each block."""
    rows, columns = weight.shape[-2:]
    blocks = weight.view(-1, rows // GROUP, GROUP, columns // GROUP, GROUP)
    scales = blocks.abs().amax((2, 4), keepdim=True).float() / LARGEST
    shape = (*weight.shape[:-2], rows // GROUP, columns // GROUP)
    return Fp8Weight((blocks / scales).to(E4M3).view(weight.shape), scales.view(shape))
