"""KV in page-locked memory of the host, beside a GPU's pool."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.in_process import spec
from benchmarks.parts import load_model, worker_parts
from common.kv import host_memory, kv_pool
from common.kv.block_pool import BlockPool
from common.kv.host_cache import HostCache
from common.kv.host_room import HostMemoryError
from common.kv.kv_pool import KvLayout
from common.worker.worker_parts import WorkerParts
from tests.gpu.greedy import DEVICE, assert_greedy, text
from tests.one_worker import OneWorker

LENGTHS = (64, 65, 100, 129, 200, 257, 400)
TOKENS = 16


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_blocks_come_back_as_they_were(dtype: str) -> None:
    layout = KvLayout(num_blocks=64, num_layers=3, block_size=16, num_kv_heads=2, head_dim=64, dtype=dtype)
    pool, blocks = kv_pool.allocate(layout, DEVICE), BlockPool(64)
    cache = HostCache(blocks, host_memory.allocate(pool, 100))
    raw = pool.tensor.view(torch.uint8)
    raw.random_()
    torch.cuda.synchronize()
    taken = blocks.allocate(40)
    taken = taken[::2] + taken[1::2]  # in runs of one
    contents = raw[taken].clone()
    hashes = [number.to_bytes(16, "little") for number in range(40)]
    for block, block_hash in zip(taken, hashes, strict=True):
        blocks.publish(block, block_hash)
    while not cache.all_saved:
        cache.turn()
    blocks.release(taken)
    fresh = blocks.allocate(64)[10:50]
    raw.zero_()
    torch.cuda.synchronize()
    load = cache.load(hashes, fresh)
    assert load is not None
    while not load.arrived():
        cache.turn()
    assert torch.equal(raw[fresh], contents)
    cache.close()


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_prompts_that_are_loaded_are_answered_as_before(smollm2: Path, graphs: bool) -> None:
    """While others are computed, on a pool that holds a part of them."""
    parts = with_host(worker_parts(load_model(smollm2, "float32", DEVICE, dummy=False, max_length=1024), 40), 200)
    one = OneWorker(parts, chunk_tokens=48, graphs=graphs)
    asked = text(smollm2, LENGTHS)
    specs = [spec(tokens, len(tokens) + TOKENS, temperature=0) for tokens in asked]
    for _ in range(3):
        assert_greedy(smollm2, asked, one.run(specs), TOKENS)
    assert one._engine._metrics.loaded_tokens._value.get() > sum(LENGTHS)
    settle(parts)
    assert parts.caches[1].in_use_count == 0


def test_memory_that_cannot_be_locked_is_a_sentence() -> None:
    layout = KvLayout(num_blocks=1, num_layers=1, block_size=16, num_kv_heads=2, head_dim=64, dtype="bfloat16")
    with pytest.raises(HostMemoryError, match=r"cannot be locked.*lower --host-cache-gib"):
        host_memory.allocate(kv_pool.allocate(layout, DEVICE), 2**46 // layout.block_bytes)


def with_host(parts: WorkerParts, num_blocks: int) -> WorkerParts:
    return replace(parts, host_cache=HostCache(parts.blocks, host_memory.allocate(parts.pool, num_blocks)))


def settle(parts: WorkerParts) -> None:
    assert parts.host_cache is not None
    while not parts.host_cache.all_saved:
        parts.host_cache.turn()
