"""The pool of a worker on a CPU, if no setting says how large."""

import pytest
import torch

from common.device import cpu_memory
from common.kv.kv_pool import KvLayout
from common.kv.pool_size import CPU_POOL_MOST_BYTES, CPU_POOL_SHARE, blocks_that_fit

CPU = torch.device("cpu")
LAYOUT = KvLayout(1, num_layers=4, block_size=16, num_kv_heads=2, head_dim=64, dtype="float32")


def fit(monkeypatch: pytest.MonkeyPatch, available: int) -> int:
    monkeypatch.setattr(cpu_memory, "available_bytes", lambda: available)
    return blocks_that_fit(LAYOUT, CPU, 0)


def test_it_takes_a_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(monkeypatch, 1 << 30) == int((1 << 30) * CPU_POOL_SHARE) // LAYOUT.block_bytes


def test_no_more_than_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(monkeypatch, 60 << 30) == CPU_POOL_MOST_BYTES // LAYOUT.block_bytes
