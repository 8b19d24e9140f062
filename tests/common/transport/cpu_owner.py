"""A prefill worker on a CPU, as far as its pool goes: fills it, tells its descriptor, and obeys one-word commands."""

import torch

from common import transport
from common.kv.kv_pool import KvLayout, allocate
from tests.e2e.hosts import Host
from tests.pool_owner import PoolOwner

CPU = torch.device("cpu")
LAYOUT = KvLayout(num_blocks=24, num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, dtype="bfloat16")

_PROGRAM = """
import sys, torch
from common import transport
from common.kv.block_pool import BlockPool
from common.kv.kv_pool import KvLayout, view

name, instance, num_blocks, head_dim = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
layout = KvLayout(num_blocks, 3, 4, 2, head_dim, "bfloat16")
memory = transport.create(name, layout, torch.device("cpu"), instance)
pool, blocks = view(memory.tensor, layout), BlockPool(num_blocks, memory.generations)
held = blocks.allocate(num_blocks)
generator = torch.Generator().manual_seed(7)
pool.copy_(torch.randn(layout.shape, generator=generator))
print(memory.descriptor.decode(), flush=True)
for command in sys.stdin:
    if command == "reuse\\n":
        blocks.release(held[5:6])
        (block,) = blocks.allocate(1)
        pool[block] = 0
        print(block, flush=True)
    elif command == "spoil\\n":  # of nixl: the probe lies behind the pool, in the same memory
        storage = memory.tensor.untyped_storage()
        storage[len(storage) - 1] ^= 1
        print("spoilt", flush=True)
    elif command == "close\\n":
        memory.close()
        print("closed", flush=True)
"""


class CpuOwner(PoolOwner):
    """`layout` may differ from LAYOUT in its number of blocks and its head_dim."""

    def __init__(self, name: str, instance: str, layout: KvLayout = LAYOUT, host: Host | None = None) -> None:
        super().__init__(_PROGRAM, name, instance, str(layout.num_blocks), str(layout.head_dim), host=host)


def filled() -> torch.Tensor:
    """What a pool of LAYOUT holds."""
    return torch.randn(LAYOUT.shape, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)


def assert_blocks_arrive_and_nothing_else(peer: transport.PeerPool, ours: KvLayout) -> None:
    """Reads blocks of a pool of LAYOUT into one of `ours`, of 40 blocks."""
    pool = allocate(ours, CPU)
    source = [3, 4, 5, 11, 0, 23, 22, 21]
    target = [7, 8, 9, 0, 39, 20, 21, 22]
    transfer = peer.read(source, pool, target)
    transfer.wait()
    assert transfer.done()
    assert transfer.milliseconds > 0
    expected = torch.zeros(ours.shape, dtype=torch.bfloat16)
    expected[target] = filled()[source]
    assert torch.equal(pool.tensor, expected)
