"""The pool of a worker on a CPU, if no setting says how large."""

from pathlib import Path

import pytest
import torch

from common.kv.kv_pool import KvLayout
from common.kv.pool_size import CPU_POOL_MOST_BYTES, CPU_POOL_SHARE, blocks_that_fit

CPU = torch.device("cpu")
LAYOUT = KvLayout(1, num_layers=4, block_size=16, num_kv_heads=2, head_dim=64, dtype="float32")


def fit(monkeypatch: pytest.MonkeyPatch, free: int, available: int) -> int:
    """On a machine with so many bytes free, and so many that processes can have."""
    meminfo = f"MemTotal: {64 << 20} kB\nMemFree: {free >> 10} kB\nMemAvailable: {available >> 10} kB\n"
    monkeypatch.setattr(Path, "read_text", lambda _path, **_options: meminfo)
    return blocks_that_fit(LAYOUT, CPU, 0)


def test_memory_that_caches_files_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """After hours nearly all memory does, on a machine with much left for processes."""
    assert fit(monkeypatch, 20 << 20, 1 << 30) == int((1 << 30) * CPU_POOL_SHARE) // LAYOUT.block_bytes


def test_no_more_than_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(monkeypatch, 60 << 30, 60 << 30) == CPU_POOL_MOST_BYTES // LAYOUT.block_bytes
