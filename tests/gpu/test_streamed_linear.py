"""Products that stream their weight, against float32; the layers that they are of are in tests/kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)
if torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("no Hopper GPU: its matrix units' instructions are what this is written in", allow_module_level=True)

from common.device.graph_capture import capture
from kernels.cuda import fastest_linear, triton_launch
from kernels.cuda.gpu import multiprocessors
from kernels.cuda.streamed_linear import MAX_ROWS, add_streamed_linear, streamed_linear, suits_stream
from kernels.cuda.triton_norm import rms_norm
from kernels.hidden import Hidden
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
    if residual is None:
        assert_close(streamed_linear(x, w, bias=bias), expected)
        return
    expected += residual.float()
    assert_close(add_streamed_linear(residual, x, w, bias, None).states, expected)


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


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 23, 32, 33, 64, 65, 90, 112, 128])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products(rows: int, outputs: int, inputs: int) -> None:
    check(randn(rows, inputs), weight(outputs, inputs))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("rows", [3, 16, 64, 77, 128])
@pytest.mark.parametrize(("outputs", "inputs"), [(1024, 2048), (488, 320), (MANY, 256)])
def test_bias_and_residual(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x, w = randn(rows, inputs, dtype=dtype), weight(outputs, inputs, dtype)
    bias, residual = randn(outputs, dtype=dtype, seed=2), randn(rows, outputs, dtype=dtype, seed=3)
    check(x, w, bias=bias)
    check(x, w, bias=bias, residual=residual.clone())
    given = residual.clone()
    assert add_streamed_linear(given, x, w, None, None).states is given


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 16, 31, 64, 80, 128])
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
            activated = streamed_linear(rms_norm(hidden, norm, 1e-6), gate_up, gated=True)
            add_streamed_linear(hidden, activated, down, None, None)
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


def test_a_chain_without_launches_of_norms_in_a_graph_always_gives_the_same() -> None:
    layers = [
        (weight(2 * 1536, 640, seed=i), weight(640, 1536, seed=100 + i), 1 + weight(1, 640)[0]) for i in range(12)
    ]
    x = randn(33, 640)

    def chain(*, begin: bool) -> Tensor:
        hidden = Hidden(x.clone())
        for gate_up, down, norm in layers:
            activated = fastest_linear.norm_gated_linear(hidden, norm, 1e-6, gate_up)
            hidden = fastest_linear.add_linear(hidden, activated, down, None, norm if begin else None)
        return hidden.states

    first, with_launches = chain(begin=True), chain(begin=False)
    error = (first.float() - with_launches.float()).norm() / with_launches.float().norm()
    assert error < 3e-2
    check_replays(lambda: chain(begin=True), first)


@pytest.mark.parametrize("rows", [1, 2, 3, 9, 40, 100, 200])
def test_layers_are_the_same_with_and_without_early_starts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-0.5B's shape: of its products some are streamed and some are not, and all write one residual."""
    slow, output, norm = weight(896, 9344), weight(896, 896, seed=2), 1 + weight(1, 896)[0]
    gate_up, down = weight(2 * 4864, 896, seed=3), weight(896, 4864, seed=4)
    x, attended, hidden = randn(rows, 9344), randn(rows, 896, seed=5), randn(rows, 896, seed=6)

    def layers() -> Tensor:
        residual = Hidden(hidden.clone())
        for _ in range(8):
            residual = fastest_linear.add_linear(residual, attended, output, None, None)
            residual = fastest_linear.add_linear(residual, x, slow, None, norm)
            activated = fastest_linear.norm_gated_linear(residual, norm, 1e-6, gate_up)
            residual = fastest_linear.add_linear(residual, activated, down, None, None)
        return residual.states

    monkeypatch.setattr(triton_launch, "enabled", False)
    expected = layers()
    monkeypatch.setattr(triton_launch, "enabled", True)
    check_replays(layers, expected)


def check_begun(rows: int, hidden_size: int, norm: Tensor) -> Hidden:
    """By a layer of 320 inputs. One token is far larger than the others."""
    states, x = randn(rows, hidden_size, seed=2), randn(rows, 320, seed=3)
    states[0] *= 100
    output = weight(hidden_size, 320)
    expected = states.float() + x.float() @ output.float().T
    hidden = add_streamed_linear(states, x, output, None, norm)
    assert hidden.states is states
    assert_close(states, expected)
    assert hidden.begun is not None
    assert_close(hidden.begun.x, states.float() * norm.float())
    torch.testing.assert_close(hidden.begun.squares.sum(1), states.float().square().sum(1), rtol=1e-5, atol=0)
    return hidden


def check_begun_norm(rows: int, hidden_size: int) -> None:
    """Ended by a layer with SiLU and by one without."""
    norm = 1 + randn(hidden_size, seed=4) / 5
    hidden = check_begun(rows, hidden_size, norm)
    normed = F.rms_norm(hidden.states.float(), (hidden_size,), norm.float(), 1e-6)
    bias, qkv, gate_up = randn(200, seed=5), weight(200, hidden_size), weight(2 * 104, hidden_size)
    assert_close(ended(hidden, qkv, bias=bias), normed @ qkv.float().T + bias.float())
    gate, up = (normed @ gate_up.float().T).chunk(2, dim=1)
    assert_close(ended(hidden, gate_up, gated=True), F.silu(gate) * up)


def ended(hidden: Hidden, w: Tensor, *, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    assert hidden.begun is not None
    return streamed_linear(hidden.begun.x, w, squares=hidden.begun.squares, eps=1e-6, bias=bias, gated=gated)


# Hidden sizes of one tile and of as many as there may be.
@pytest.mark.parametrize("rows", [1, 5, 8, 16, 31, 64, 72, 96, 97, 128])
@pytest.mark.parametrize("hidden_size", [64, 576, 1024])
def test_a_norm_that_is_begun_and_ended(hidden_size: int, rows: int) -> None:
    check_begun_norm(rows, hidden_size)


@pytest.mark.parametrize("rows", [1, 9, 64])
@pytest.mark.parametrize("hidden_size", [8, 328])
def test_a_norm_is_begun_over_part_of_a_tile(hidden_size: int, rows: int) -> None:
    check_begun(rows, hidden_size, 1 + randn(hidden_size, seed=4) / 5)


def test_a_layer_takes_the_norm_from_where_it_was_begun() -> None:
    """Not once more from the states, which are spoilt here."""
    hidden = add_streamed_linear(randn(9, 512), randn(9, 256, seed=1), weight(512, 256), None, 1 + weight(1, 512)[0])
    w = weight(320, 512, seed=2)
    expected = ended(hidden, w)
    hidden.states.fill_(torch.nan)
    assert torch.equal(fastest_linear.norm_linear(hidden, weight(1, 512)[0], 1e-6, w, None), expected)


def test_no_norm_is_begun_where_it_would_end_in_many_parts() -> None:
    hidden = add_streamed_linear(randn(9, 1088), randn(9, 256, seed=1), weight(1088, 256), None, weight(1, 1088)[0])
    assert hidden.begun is None


def test_no_norm_is_begun_in_float16() -> None:
    """A state of 60,000 times its weight of 2 is infinite there."""
    states = torch.full((4, 128), 6e4, dtype=torch.float16, device=DEVICE)
    w, zeros = weight(128, 64, torch.float16), torch.zeros(4, 64, dtype=torch.float16, device=DEVICE)
    norm = torch.full((128,), 2, dtype=torch.float16, device=DEVICE)
    hidden = fastest_linear.add_linear(Hidden(states), zeros, w, None, norm)
    assert hidden.begun is None
    eye = torch.eye(128, dtype=torch.float16, device=DEVICE)
    assert_close(fastest_linear.norm_linear(hidden, norm, 1e-6, eye, None), norm.expand(4, 128))


@pytest.mark.parametrize(
    ("outputs", "inputs", "options", "takes"),
    [
        (4096, 1024, {"begun": True}, True),
        (4096, 1024, {}, False),
        (1024, 3072, {"begins": randn(1024)}, True),
        (1024, 3072, {}, False),
        (960, 576, {"begun": True}, False),
        (2048, 2048, {"begins": randn(2048)}, False),
        (2048, 6144, {}, False),
        (2 * 6144, 2048, {"gated": True}, True),
        (5120, 5120, {}, False),
        (4096, 4096, {}, True),
        (4096, 14336, {}, True),
    ],
)
def test_which_products_of_more_than_32_rows_are_taken(
    outputs: int, inputs: int, options: dict[str, Any], takes: bool
) -> None:
    w = weight(outputs, inputs)
    assert fastest_linear.streams(randn(32, inputs), w, **options)
    assert fastest_linear.streams(randn(33, inputs), w, **options) == takes


@pytest.mark.parametrize(
    ("outputs", "inputs", "options", "takes"),
    [
        (4096, 1024, {"begun": True}, True),
        (1024, 3072, {"adds": True, "begins": randn(1024)}, True),
        (4096, 1024, {}, False),
        (2 * 6144, 2048, {"gated": True}, False),
        (2048, 2048, {"adds": True}, False),
        (2048, 6144, {"adds": True}, False),
        (2560, 9728, {"adds": True}, True),
        (6144, 4096, {}, False),
        (5120, 5120, {"adds": True}, False),
        (4096, 4096, {"adds": True}, True),
        (4096, 14336, {"adds": True}, True),
    ],
)
def test_which_products_of_more_than_64_rows_are_taken(
    outputs: int, inputs: int, options: dict[str, Any], takes: bool
) -> None:
    w = weight(outputs, inputs)
    assert fastest_linear.streams(randn(65, inputs), w, **options) == takes
    assert not fastest_linear.streams(randn(129, inputs), w, **options)


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
