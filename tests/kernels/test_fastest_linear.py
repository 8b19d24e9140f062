"""Linear layers, of few rows and in tiles, with what is fused into them."""

import pytest
import torch

checks = pytest.importorskip("tests.kernels.checks", exc_type=ImportError)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 96, 1024), (3, 50, 576), (4, 33, 2112), (2, 7, 40)])
def test_few_rows(rows: int, outputs: int, inputs: int, with_bias: bool, dtype: torch.dtype) -> None:
    checks.check_linear(rows, outputs, inputs, with_bias, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "intermediate", "inputs"), [(1, 48, 1024), (3, 50, 576), (4, 17, 2112)])
def test_few_rows_gated(rows: int, intermediate: int, inputs: int, dtype: torch.dtype) -> None:
    checks.check_norm_gated_linear(rows, intermediate, inputs, dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [(5, 96, 576), (200, 80, 192), (20, 40, 1024), (70, 32, 1024)],  # the last two: parts of the inputs added up
)
def test_tiles(rows: int, outputs: int, inputs: int, with_bias: bool) -> None:
    checks.check_linear(rows, outputs, inputs, with_bias, torch.float16)


@pytest.mark.parametrize(("rows", "intermediate", "inputs"), [(5, 48, 576), (40, 24, 1024), (130, 40, 128)])
def test_tiles_gated(rows: int, intermediate: int, inputs: int) -> None:
    checks.check_norm_gated_linear(rows, intermediate, inputs, torch.float16)


def test_few_rows_of_many_inputs() -> None:
    """More inputs than a program holds at a time, of a gate and of up together."""
    checks.check_norm_gated_linear(1, 8, 8256, torch.float16)
    checks.check_linear(1, 8, 20_000, False, torch.float16)


def test_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than the kernels are for, inputs that tiles do not divide, a dtype that they do not take, and none."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("not for the library")

    monkeypatch.setattr(checks.fastest_linear, "tiled_linear", refuse)
    monkeypatch.setattr(checks.fastest_linear, "few_rows_linear", refuse)
    monkeypatch.setattr(checks.fastest_linear, "streams", lambda *_, **__: False)  # as on all GPUs but Hoppers
    checks.check_linear(260, 24, 64, True, torch.float16)
    checks.check_linear(7, 24, 72, True, torch.float16)
    checks.check_linear(130, 24, 64, True, torch.float32)
    checks.check_norm_gated_linear(260, 24, 64, torch.float16)
    checks.check_linear(0, 24, 64, True, torch.float32)
    with pytest.raises(AssertionError, match="not for the library"):
        checks.check_linear(7, 24, 64, True, torch.float16)
    with pytest.raises(AssertionError, match="not for the library"):
        checks.check_linear(1, 24, 64, True, torch.float16)


def test_add_of_rows_that_do_not_begin_at_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    tiled = checks.fastest_linear.tiled_linear
    monkeypatch.setattr(checks.fastest_linear, "tiled_linear", lambda *a, **k: calls.append(a) or tiled(*a, **k))
    checks.check_linear(7, 24, 64, True, torch.float16, between_rows=1)
    assert len(calls) == 1, "the normed rows only, which lie end to end"
