"""Packed matrices, against products with the matrix itself."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packed import _padded, linear, pack


def _randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _packed(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = _randn(outputs, inputs, dtype=dtype, seed=1)
    packed = pack(weight)
    if not packed.is_mkldnn:
        pytest.skip(f"this CPU has no packed layout for {dtype}")
    return weight, packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 64), (7, 5), (160, 40), (300, 1024), (4096, 576)])
def test_against_the_plain_matrix(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight, packed = _packed(outputs, inputs, dtype)
    assert packed.shape == weight.shape
    assert torch.equal(packed.to_dense(), weight)
    bias = _randn(outputs, dtype=dtype, seed=2)
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.5}
    for rows in (0, 1, 2, 8, 9, 64, 300):
        x = _randn(rows, inputs, dtype=dtype, seed=3)
        for added in (None, bias):
            expected = F.linear(x.double(), weight.double(), None if added is None else added.double())
            torch.testing.assert_close(linear(x, packed, added), expected.to(dtype), **tolerance)


def test_rows_and_weights_that_are_strided_views() -> None:
    whole, x = _randn(96, 128, dtype=torch.float32, seed=1), _randn(5, 128, dtype=torch.float32, seed=3)
    packed = pack(whole[:, :64])
    if packed.is_mkldnn:
        torch.testing.assert_close(linear(x[:, 64:], packed, None), x[:, 64:] @ whole[:, :64].T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_stay_as_they_are(dtype: torch.dtype) -> None:
    weight = _randn(8, 8, dtype=dtype, seed=1)
    assert pack(weight) is weight


def test_few_sizes_are_compiled_for() -> None:
    sizes = [_padded(tokens) for tokens in range(1, 513)]
    assert len(set(sizes)) < 60
    assert all(tokens <= size <= tokens * 1.125 for tokens, size in enumerate(sizes, start=1))
    assert sizes[:16] == list(range(1, 17))


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_one_token_without_avx_512_is_multiplied_with_the_plain_matrix(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = _packed(8, 8, torch.float32)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    weight = before.clone()
    packed = pack(weight, may_keep=True)
    weight.zero_()
    for rows, zero in ((1, capability == "AVX2"), (2, False)):
        x = _randn(rows, 8, dtype=torch.float32, seed=3)
        expected = torch.zeros(rows, 8) if zero else x @ before.T
        torch.testing.assert_close(linear(x, packed, None), expected)
