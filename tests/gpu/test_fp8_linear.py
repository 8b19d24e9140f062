"""Linear layers with weights of 8-bit floats, against the references; quantizing itself is in tests/kernels."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)
if torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("no Hopper GPU: its matrix units' instructions are what this is written in", allow_module_level=True)

from common.device.graph_capture import capture
from kernels import fp8, linear
from kernels.cuda import fastest_linear
from kernels.cuda.streamed_linear import MAX_ROWS, suits_stream
from kernels.cuda.triton_fp8 import Quantized, quantize
from kernels.fp8 import GROUP, Fp8Weight
from kernels.hidden import Hidden
from kernels.linear import Mlp
from tests.kernels.inputs import DEVICE

EPS = 1e-5
TOKENS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 90, 112, 128, 129, 1024)
SHAPES = [  # outputs of one matrix, inputs
    (512, 256),
    (1280, 1024),  # split-K
    (384, 2176),  # a split with fewer steps than others
    (512, 4224),  # with up to 16 tokens, a split without any
    (4096, 4096),
    (9216, 512),  # two warpgroups
    (17_408, 512),  # as an MLP, more outputs of gate and up than are streamed
]
CASES = [
    *((shape, in_blocks) for shape in SHAPES for in_blocks in (False, True)),
    ((720, 384), False),  # no whole tiles, and as inputs of down, no whole steps
]


def randn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def weight(outputs: int, inputs: int, in_blocks: bool) -> Fp8Weight:
    """Scales that differ by up to a factor of ten, so that a wrong one shows."""
    values = randn(outputs, inputs, seed=1).mul_(16).to(fp8.E4M3)
    shape = (outputs // GROUP, inputs // GROUP) if in_blocks else (outputs, 1)
    scales = torch.rand(shape, generator=torch.Generator(DEVICE).manual_seed(2), device=DEVICE)
    return Fp8Weight(values, (scales + 0.1) / (16 * inputs**0.5))


def states(tokens: int, inputs: int) -> Tensor:
    """Groups whose largest values differ, so that a wrong scale shows."""
    sizes = torch.rand(tokens, inputs // GROUP, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE)
    return (randn(tokens, inputs) * (sizes + 0.1).repeat_interleave(GROUP, 1)).bfloat16()


def exact(x: Quantized, matrix: Fp8Weight) -> Tensor:
    values, scales = x.values[: x.tokens], x.scales[: x.tokens]
    return F.linear(fp8.dequantize(values, scales), fp8.dequantize(matrix.values, matrix.scales))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 0.004) -> None:
    """By relative norm of each token."""
    assert actual.shape == expected.shape
    assert actual.dtype == torch.bfloat16
    errors = (actual.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
    assert errors.max() < tolerance, f"relative errors up to {errors.max():.2e}"  # NaN fails too


def check_norm_linear(tokens: int, shape: tuple[int, int], in_blocks: bool, biased: bool) -> None:
    matrix, norm = weight(*shape, in_blocks), randn(shape[1], seed=4).bfloat16()
    bias = randn(shape[0], seed=5).bfloat16() if biased else None
    x = states(tokens, shape[1])
    expected = exact(quantize(x, matrix.group, norm, EPS), matrix)
    actual = fastest_linear.norm_linear(Hidden(x), norm, EPS, matrix, bias)
    assert_near(actual, expected if bias is None else expected + bias)


def check_add_linear(tokens: int, shape: tuple[int, int], in_blocks: bool, biased: bool) -> None:
    matrix, x, before = weight(*shape, in_blocks), states(tokens, shape[1]), randn(tokens, shape[0], seed=6).bfloat16()
    bias = randn(shape[0], seed=5).bfloat16() if biased else None
    expected = before + exact(quantize(x, matrix.group), matrix)
    added = fastest_linear.add_linear(Hidden(before), x, matrix, bias, None).states
    assert added is before
    assert_near(added, expected if bias is None else expected + bias)


def check_add_mlp(tokens: int, shape: tuple[int, int], in_blocks: bool) -> None:
    intermediate, size = shape
    mlp = Mlp(weight(2 * intermediate, size, in_blocks), weight(size, intermediate, in_blocks))
    norm, x = randn(size, seed=4).bfloat16(), states(tokens, size)
    expected = linear.add_mlp(Hidden(x.clone()), norm, EPS, mlp, None).states
    added = fastest_linear.add_mlp(Hidden(x), norm, EPS, mlp, None).states
    assert added is x
    # Beside roundings, an input next to the middle between two 8-bit floats may become either.
    assert_near(added, expected, 0.05)


@pytest.mark.parametrize(("shape", "in_blocks"), CASES)
def test_products(shape: tuple[int, int], in_blocks: bool) -> None:
    for tokens in TOKENS:
        for biased in (False, True):
            check_norm_linear(tokens, shape, in_blocks, biased)
            check_add_linear(tokens, shape, in_blocks, biased)


@pytest.mark.parametrize(("shape", "in_blocks"), CASES)
def test_mlps(shape: tuple[int, int], in_blocks: bool) -> None:
    for tokens in TOKENS:
        check_add_mlp(tokens, shape, in_blocks)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_rows_that_are_strided_views(in_blocks: bool) -> None:
    matrix = weight(512, 256, in_blocks)
    for tokens in (5, 100):
        x = states(tokens, 512)[:, 256:]
        before = torch.zeros(tokens, 512, dtype=torch.bfloat16, device=DEVICE)
        expected = exact(quantize(x.contiguous(), matrix.group), matrix)
        assert_near(fastest_linear.add_linear(Hidden(before), x, matrix, None, None).states, expected)


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("tokens", [3, 64, 200])
def test_not_a_number_stays_with_its_token(tokens: int, in_blocks: bool) -> None:
    matrix, norm = weight(1280, 1024, in_blocks), randn(1024).bfloat16()
    clean = states(tokens, 1024)
    expected = fastest_linear.norm_linear(Hidden(clean), norm, EPS, matrix, None)
    bad = clean.clone()
    bad[1, 700] = torch.nan
    out = fastest_linear.norm_linear(Hidden(bad), norm, EPS, matrix, None)
    assert out[1].isnan().all()
    others = [token for token in range(tokens) if token != 1]
    assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("tokens", [1, 40, 80])
def test_a_chain_of_layers_in_a_graph(tokens: int, in_blocks: bool) -> None:
    """Kernels that begin before the ones before them have ended wait where they must."""
    mlp = Mlp(weight(2 * 2048, 1024, in_blocks), weight(1024, 2048, in_blocks))
    norm, x = randn(1024).bfloat16(), states(tokens, 1024)

    def run() -> Tensor:
        hidden = Hidden(x.clone())
        for _ in range(6):
            hidden = fastest_linear.add_mlp(hidden, norm, EPS, mlp, norm)
        return hidden.states

    check_replays(run)


def check_replays(work: Callable[[], Tensor]) -> None:
    expected = work().clone()
    graph, captured = capture(work, torch.cuda.graph_pool_handle())
    for _ in range(200):
        graph.replay()
        assert torch.equal(captured, expected)


def test_few_tokens_are_streamed() -> None:
    for in_blocks in (False, True):
        matrix = weight(4096, 4096, in_blocks)
        assert suits_stream(states(MAX_ROWS, 4096), matrix)
        assert not suits_stream(states(MAX_ROWS + 1, 4096), matrix)
