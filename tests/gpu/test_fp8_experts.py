"""Quantizing to 8-bit floats, and mixtures of experts of them, at the sizes of serving."""

import pytest
import torch

if not torch.cuda.is_available():  # importing the kernels here would keep tests/kernels from interpreting them
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from kernels.cuda import triton_experts, triton_launch
from kernels.experts import Experts
from kernels.hidden import Hidden
from tests.kernels.inputs import randn

checks = pytest.importorskip("tests.kernels.fp8_checks", exc_type=ImportError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", ["", "norm", "gate"])
@pytest.mark.parametrize("rows", [1, 8192])
@pytest.mark.parametrize(
    ("width", "group"), [(2048, 128), (768, 128), (4096, 128), (576, 576), (4096, 4096), (14_336, 14_336)]
)
def test_quantize(rows: int, width: int, group: int, before: str, dtype: torch.dtype) -> None:
    checks.check_quantize(rows, width, group, before, dtype)


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 1500])
@pytest.mark.parametrize(("hidden", "intermediate", "count", "per_token"), [(2048, 768, 32, 8), (1024, 3584, 8, 2)])
def test_experts(tokens: int, hidden: int, intermediate: int, count: int, per_token: int, in_blocks: bool) -> None:
    dtype = torch.bfloat16
    checks.check_grouped(tokens, intermediate, hidden, count, per_token, in_blocks, dtype)
    checks.check_grouped(tokens, hidden, intermediate, count, per_token, in_blocks, dtype)
    checks.check_mix(tokens, hidden, intermediate, count, per_token, in_blocks, dtype)
    checks.check_add_experts(tokens, count == 8, in_blocks, dtype)


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize(("tokens", "count"), [(1, 16), (40, 16), (200, 16), (200, 4)])
def test_experts_in_a_graph(tokens: int, count: int, in_blocks: bool) -> None:
    """Captured once, for tokens of other experts; kernels that start early wait for what they read."""
    hidden, intermediate = 1024, 384
    gate_up = checks.stack(count, 2 * intermediate, hidden, in_blocks, seed=1)
    down = checks.stack(count, hidden, intermediate, in_blocks, seed=2)
    router = randn(count, hidden, dtype=torch.bfloat16, seed=3).div_(hidden**0.5)
    weights = Experts(router, gate_up, down, 2, True)
    norm = randn(hidden, dtype=torch.bfloat16, seed=4)
    states = randn(tokens, hidden, dtype=torch.bfloat16, seed=5)

    def run() -> None:
        for _ in range(10):
            triton_experts.add_experts(Hidden(states), norm, 1e-5, weights)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed in range(6, 16):
        start = randn(tokens, hidden, dtype=torch.bfloat16, seed=seed)
        states.copy_(start)
        triton_launch.enabled = False
        try:
            run()
        finally:
            triton_launch.enabled = True
        expected = states.clone()
        states.copy_(start)
        graph.replay()
        assert torch.equal(states, expected)
