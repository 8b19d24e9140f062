"""The linear references by their definition, with plain and packed weights."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.hidden import Hidden
from kernels.linear import add_linear, norm_gated_linear, norm_linear
from kernels.packed import pack

EPS = 1e-5


def _randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _normed(x: Tensor, norm: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("outputs", [24, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_against_the_definition_in_float64(packed: bool, outputs: int, rows: int, dtype: torch.dtype) -> None:
    x, norm = _randn(rows, 40, dtype=dtype, seed=1), _randn(40, dtype=dtype, seed=2)
    weight, bias = _randn(outputs, 40, dtype=dtype, seed=3), _randn(outputs, dtype=dtype, seed=4)
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.5}
    product, unnormed = _normed(x, norm) @ weight.double().T, x.double() @ weight.double().T
    if packed:
        weight = pack(weight)

    def close(actual: Tensor, expected: Tensor) -> None:
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, expected.to(dtype), **tolerance)

    close(norm_linear(Hidden(x), norm, EPS, weight, None), product)
    close(norm_linear(Hidden(x), norm, EPS, weight, bias), product + bias.double())
    gate, up = product.chunk(2, dim=-1)
    close(norm_gated_linear(Hidden(x), norm, EPS, weight), F.silu(gate) * up)
    residual = _randn(rows, outputs, dtype=dtype, seed=5)
    hidden = Hidden(residual.clone())
    added = add_linear(hidden, x, weight, bias, None)
    assert added.states is hidden.states
    close(added.states, residual.double() + unnormed + bias)
