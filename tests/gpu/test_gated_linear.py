"""Gate, up and SiLU in one kernel, against float32; the layers that it is of are in tests/kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)
if torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("no Hopper GPU: its matrix units' instructions are what this is written in", allow_module_level=True)

from kernels.cuda import fastest_linear
from kernels.cuda import gated_linear as gated_linear_module
from kernels.cuda.fastest_linear import norm_gated_linear
from kernels.cuda.gated_linear import MAX_ROWS, gated_linear, suits_gated
from kernels.cuda.triton_norm import rms_norm
from kernels.hidden import Hidden
from tests.gpu.test_streamed_linear import BF16, check_replays, gated_reference, randn, weight
from tests.kernels.inputs import DEVICE, assert_close


def check(x: Tensor, w: Tensor) -> None:
    assert suits_gated(x, w)
    assert_close(gated_linear(x, w), gated_reference(x, w))


# One tile or many, with ends; fewer steps than stages; one round, and several with a last one that not all have.
SHAPES = [
    (8, 64),
    (104, 192),
    (488, 320),
    (1000, 896),
    (4864, 896),
    (6144, 2048),
    (14336, 4096),
    (17408, 5120),
    (18944, 3584),
]


@pytest.mark.parametrize("rows", [1, 64, 65, 72, 97, 127, 128, 129, 160, 200, 256])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products(rows: int, outputs: int, inputs: int) -> None:
    check(randn(rows, inputs), weight(2 * outputs, inputs))


@pytest.mark.parametrize("rows", [100, 256])
def test_float16(rows: int) -> None:
    check(randn(rows, 1024, dtype=torch.float16), weight(2 * 3000, 1024, torch.float16))


def test_rows_that_lie_apart() -> None:
    check(randn(150, 5 * 256)[:, 256:512], weight(2 * 640, 256))


def test_large_numbers() -> None:
    """A gate far below zero gives zero, and far above it itself."""
    x = torch.zeros(65, 64, dtype=BF16, device=DEVICE)
    x[:, 0] = 1
    w = torch.zeros(16, 64, dtype=BF16, device=DEVICE)
    w[:8, 0] = torch.tensor([-1e30, -200, -90, 0, 90, 200, 1e30, 1], device=DEVICE)
    w[8:, 0] = 2
    assert_close(gated_linear(x, w), gated_reference(x, w))


def test_what_lies_behind_the_tensors_does_not_matter() -> None:
    x, w = torch.full((256, 512), torch.nan, dtype=BF16, device=DEVICE), weight(2 * 1024, 512)
    w[2000:] = torch.nan
    x[:133] = randn(133, 512)
    check(x[:133], w[:2000])


@pytest.mark.parametrize("rows", [96, 200])
def test_a_chain_of_launches_in_a_graph_always_gives_the_same(rows: int) -> None:
    """Each begins while the one before still runs, and reads what that writes."""
    layers = [
        (weight(2 * 5120, 1024, seed=i), weight(1024, 5120, seed=100 + i), 1 + weight(1, 1024)[0]) for i in range(8)
    ]
    x = randn(rows, 1024)

    def chain() -> Tensor:
        hidden = x.clone()
        for gate_up, down, norm in layers:
            hidden = hidden + F.linear(norm_gated_linear(Hidden(hidden), norm, 1e-6, gate_up), down)
        return hidden

    def by_library() -> Tensor:
        hidden = x.clone()
        for gate_up, down, norm in layers:
            gate, up = F.linear(rms_norm(hidden, norm, 1e-6), gate_up).chunk(2, dim=1)
            hidden = hidden + F.linear(F.silu(gate) * up, down)
        return hidden

    first = chain()
    assert (first.float() - by_library().float()).norm() / first.float().norm() < 3e-2
    check_replays(chain, first)


@pytest.mark.parametrize("outputs", [6144, 14336, 17408, 25600])
@pytest.mark.parametrize("rows", [96, 200])
def test_tiles_are_never_small(outputs: int, rows: int) -> None:
    """Then loading x would take longer than anything else."""
    assert gated_linear_module._plan(rows, 2 * outputs, 5120, DEVICE).tile_rows >= 96


@pytest.mark.parametrize(("rows", "takes"), [(65, True), (128, True), (129, False), (175, False), (176, True)])
def test_which_numbers_of_rows_are_taken(rows: int, takes: bool) -> None:
    assert fastest_linear._gates(randn(rows, 1024), weight(2 * 8192, 1024)) == takes


def test_what_does_not_suit() -> None:
    w = weight(256, 128)
    assert suits_gated(randn(MAX_ROWS, 128), w)
    assert not suits_gated(randn(MAX_ROWS + 1, 128), w)
    assert not suits_gated(randn(70, 128, dtype=torch.float32), w.float())
    assert not suits_gated(randn(70, 96), weight(256, 96))
    assert not suits_gated(randn(70, 128), weight(248, 128))
    assert not suits_gated(randn(70, 1025)[:, 1:129], w)
