"""Quantizing to 8-bit floats, and mixtures of experts of them."""

import pytest
import torch

from tests.kernels.inputs import require_dot

checks = pytest.importorskip("tests.kernels.fp8_checks", exc_type=ImportError)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", ["", "norm", "gate"])
@pytest.mark.parametrize(
    ("rows", "width", "group"),
    [
        (1, 128, 128),
        (3, 88, 88),
        (5, 576, 576),
        (9, 2560, 2560),
        (8, 256, 128),
        (3, 768, 128),
        (2, 1152, 128),  # the last part of a row is cut off
        (17, 2560, 128),
    ],
)
def test_quantize(rows: int, width: int, group: int, before: str, dtype: torch.dtype) -> None:
    checks.check_quantize(rows, width, group, before, dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("width", "group"), [(384, 128), (88, 88)])
def test_quantize_of_bad_values(width: int, group: int, with_norm: bool, bad: float) -> None:
    checks.check_quantize_of_bad_values(width, group, with_norm, bad)


def test_nothing_to_quantize() -> None:
    assert checks.triton_fp8.quantize(torch.empty(0, 256), 128).tokens == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "count", "per_token", "used", "in_blocks"),
    [
        (1, 128, 384, 8, 2, None, True),
        (33, 256, 128, 4, 2, 2, True),  # experts without a token, and more than one tile for the others
        (60, 128, 256, 2, 1, None, True),
        (7, 40, 88, 11, 3, None, False),  # no whole steps of inputs or outputs
        (33, 72, 128, 4, 2, 2, False),
        (60, 48, 256, 2, 1, None, False),
    ],
)
def test_grouped(
    tokens: int,
    outputs: int,
    inputs: int,
    count: int,
    per_token: int,
    used: int | None,
    in_blocks: bool,
    dtype: torch.dtype,
) -> None:
    checks.check_grouped(tokens, outputs, inputs, count, per_token, in_blocks, dtype, used)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "in_blocks"),
    [(5, 256, 128, True), (60, 128, 256, True), (5, 88, 40, False), (60, 256, 72, False)],
)
def test_mix(tokens: int, hidden: int, intermediate: int, in_blocks: bool, dtype: torch.dtype) -> None:
    checks.check_mix(tokens, hidden, intermediate, 5, 2, in_blocks, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize(("tokens", "normalized"), [(1, True), (5, False)])
def test_norm_router_and_experts(tokens: int, normalized: bool, in_blocks: bool, dtype: torch.dtype) -> None:
    require_dot(dtype)  # the router's
    checks.check_add_experts(tokens, normalized, in_blocks, dtype)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("choices", [8, 1024, 8192, 65_536])
def test_tiles_suit_blocks_and_shared_memory(choices: int, gated: bool) -> None:
    experts = checks.triton_fp8_experts
    tile = experts._tile(choices, 128, gated)
    assert tile.inputs == checks.GROUP
    assert checks.GROUP % tile.outputs == 0
    assert tile.stages_on(torch.device("cpu"), gated, 1) == tile.stages  # an H100's
