"""Mixtures of experts: choosing, sorting, and the products of each expert."""

import pytest
import torch

from tests.kernels.inputs import require_dot

checks = pytest.importorskip("tests.kernels.checks", exc_type=ImportError)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("count", "per_token"), [(8, 2), (128, 8), (11, 3), (4, 4), (1, 1)])
def test_choose(count: int, per_token: int, normalized: bool, dtype: torch.dtype) -> None:
    checks.check_choose(5, count, per_token, normalized, dtype)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_choose_where_a_model_overflows(bad: float, normalized: bool) -> None:
    checks.check_choose_of_bad_scores(bad, normalized)


@pytest.mark.parametrize(("tokens", "count", "per_token"), [(1, 8, 2), (40, 11, 3), (700, 16, 8)])
def test_sort(tokens: int, count: int, per_token: int) -> None:
    checks.check_sort(tokens, count, per_token)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "count", "per_token", "used"),
    [
        (1, 128, 64, 8, 2, None),
        (7, 88, 40, 11, 3, None),  # no whole steps of inputs or outputs
        (33, 64, 72, 4, 2, 2),  # experts without a token, and more than one tile for the others
        (60, 64, 32, 2, 1, None),
    ],
)
def test_mix(
    tokens: int, hidden: int, intermediate: int, count: int, per_token: int, used: int | None, dtype: torch.dtype
) -> None:
    require_dot(dtype)
    checks.check_mix(tokens, hidden, intermediate, count, per_token, dtype, used)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("choices", [8, 1024, 8192, 65_536])
def test_stages_fit_into_shared_memory(
    choices: int, gated: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, device = checks.triton_experts, torch.device("cpu")
    tile = experts._tile(choices, 128, gated, dtype)
    for kib, whole in ((227, True), (99, False)):  # an H100, and Ada or a small Blackwell
        monkeypatch.setattr("kernels.cuda.gpu.shared_bytes", lambda _, size=kib << 10: size)
        stages = tile.stages_on(device, gated, dtype.itemsize)
        loaded = (tile.rows + tile.outputs * (1 + gated)) * tile.inputs * dtype.itemsize
        assert 1 <= stages <= tile.stages
        assert stages * loaded < kib << 10
        assert stages == tile.stages or not whole


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "normalized"), [(1, True), (5, False)])
def test_norm_router_and_experts(tokens: int, normalized: bool, dtype: torch.dtype) -> None:
    require_dot(dtype)
    checks.check_add_experts(tokens, normalized, dtype)
