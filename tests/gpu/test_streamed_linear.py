"""Products that stream their weight, against float32; the layers that they are of are in tests/kernels."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)
if torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("no Hopper GPU: its matrix units' instructions are what this is written in", allow_module_level=True)

from common.graph_capture import capture
from kernels import triton_launch, triton_linear
from kernels.streamed_linear import MAX_ROWS, streamed_linear, suits_stream
from kernels.triton_launch import multiprocessors
from kernels.triton_norm import rms_norm
from tests.kernels.inputs import DEVICE, assert_close

BF16 = torch.bfloat16
MANY = 128 * multiprocessors(DEVICE) + 112  # rows of a weight that make more tiles than there are multiprocessors


def randn(*sizes: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def weight(outputs: int, inputs: int, dtype: torch.dtype = BF16, seed: int = 1) -> Tensor:
    return randn(outputs, inputs, seed=seed).div_(inputs**0.5).to(dtype)


def check(x: Tensor, w: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    assert suits_stream(x, w)
    expected = F.linear(x.float(), w.float(), None if bias is None else bias.float())
    if residual is not None:
        expected += residual.float()
    assert_close(streamed_linear(x, w, bias=bias, residual=residual), expected)


def gated_reference(x: Tensor, w: Tensor) -> Tensor:
    gate, up = F.linear(x.float(), w.float()).chunk(2, dim=1)
    return F.silu(gate) * up


def check_gated(x: Tensor, w: Tensor) -> None:
    assert suits_stream(x, w, gated=True)
    assert_close(streamed_linear(x, w, gated=True), gated_reference(x, w))


def check_replays(work: Callable[[], Tensor], expected: Tensor) -> None:
    graph, captured = capture(work, torch.cuda.graph_pool_handle())
    for _ in range(200):
        graph.replay()
        assert torch.equal(captured, expected)


# One tile or many; of 64 and of 128 rows, with ends; split in 1, 2, 4 and 8, also where parts are unequal or empty;
# more stages than steps, and steps that go around the ring.
SHAPES = [
    (8, 64),
    (64, 64),
    (1024, 3072),
    (328, 576),
    (1000, 896),
    (200, 4096),
    (4096, 14336),
    (6144, 4096),
    (MANY, 192),
]


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 23, 32, 33, 64])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products(rows: int, outputs: int, inputs: int) -> None:
    check(randn(rows, inputs), weight(outputs, inputs))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("rows", [3, 16, 64])
@pytest.mark.parametrize(("outputs", "inputs"), [(1024, 2048), (488, 320), (MANY, 256)])
def test_bias_and_residual(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x, w = randn(rows, inputs, dtype=dtype), weight(outputs, inputs, dtype)
    bias, residual = randn(outputs, dtype=dtype, seed=2), randn(rows, outputs, dtype=dtype, seed=3)
    check(x, w, bias=bias)
    check(x, w, bias=bias, residual=residual.clone())
    given = residual.clone()
    assert streamed_linear(x, w, residual=given).data_ptr() == given.data_ptr()


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 16, 31, 64])
@pytest.mark.parametrize(("outputs", "inputs"), [(8, 64), (3072, 1024), (1000, 576), (MANY // 2, 512)])
def test_gated(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    check_gated(randn(rows, inputs, dtype=dtype), weight(2 * outputs, inputs, dtype))


def test_rows_that_lie_apart() -> None:
    x = randn(20, 5 * 256)[:, 256:512]
    check(x, weight(640, 256))


def test_what_lies_behind_the_tensors_does_not_matter() -> None:
    x, w = torch.full((64, 512), torch.nan, dtype=BF16, device=DEVICE), weight(1024, 512)
    w[1000:] = torch.nan
    x[:5] = randn(5, 512)
    check(x[:5], w[:1000])


def test_a_chain_of_launches_in_a_graph_always_gives_the_same() -> None:
    """Each begins while the one before still runs, and reads what that writes."""
    layers = [
        (weight(2 * 1536, 512, seed=i), weight(512, 1536, seed=100 + i), 1 + weight(1, 512)[0]) for i in range(12)
    ]
    x = randn(33, 512)

    def chain() -> Tensor:
        hidden = x.clone()
        for gate_up, down, norm in layers:
            hidden = streamed_linear(
                streamed_linear(rms_norm(hidden, norm, 1e-6), gate_up, gated=True), down, residual=hidden
            )
        return hidden

    def reference() -> Tensor:
        hidden = x.float()
        for gate_up, down, norm in layers:
            normed = F.rms_norm(hidden, (512,), norm.float(), 1e-6)
            gate, up = F.linear(normed, gate_up.float()).chunk(2, dim=1)
            hidden = hidden + F.linear(F.silu(gate) * up, down.float())
        return hidden

    first = chain()
    error = (first.float() - reference()).norm() / reference().norm()
    assert error < 3e-2
    check_replays(chain, first)


@pytest.mark.parametrize("rows", [1, 2, 3, 9, 40, 100, 200])
def test_layers_are_the_same_with_and_without_early_starts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-0.5B's shape: of its products some are streamed and some are not, and all write one residual."""
    slow, output, norm = weight(896, 9344), weight(896, 896, seed=2), 1 + weight(1, 896)[0]
    gate_up, down = weight(2 * 4864, 896, seed=3), weight(896, 4864, seed=4)
    x, attended, hidden = randn(rows, 9344), randn(rows, 896, seed=5), randn(rows, 896, seed=6)

    def layers() -> Tensor:
        residual = hidden.clone()
        for _ in range(8):
            triton_linear.add_linear(residual, attended, output, None)
            triton_linear.add_linear(residual, x, slow, None)
            activated = triton_linear.norm_gated_linear(residual, norm, 1e-6, gate_up)
            triton_linear.add_linear(residual, activated, down, None)
        return residual

    monkeypatch.setattr(triton_launch, "enabled", False)
    expected = layers()
    monkeypatch.setattr(triton_launch, "enabled", True)
    check_replays(layers, expected)


def test_what_does_not_suit() -> None:
    w = weight(256, 128)
    assert suits_stream(randn(MAX_ROWS, 128), w)
    assert not suits_stream(randn(MAX_ROWS + 1, 128), w)
    assert not suits_stream(randn(4, 128, dtype=torch.float32), w.float())
    assert not suits_stream(randn(4, 96), weight(256, 96))
    assert not suits_stream(randn(4, 128), weight(252, 128))
    assert not suits_stream(randn(4, 128), weight(248, 128), gated=True)
    assert not suits_stream(randn(4, 1025)[:, 1:129], w)
    assert not suits_stream(randn(4, 128), weight(151936, 128))
