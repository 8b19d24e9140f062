"""Pools on a CPU that another process owns."""

import torch

from common import transport
from common.kv.kv_pool import KvLayout, allocate
from tests.e2e.hosts import Host
from tests.pool_owner import PoolOwner

CPU = torch.device("cpu")
LAYOUT = KvLayout(num_blocks=24, num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, dtype="bfloat16")

_FILL = "pool.copy_(torch.randn(layout.shape, generator=torch.Generator().manual_seed(7)))"


class CpuOwner(PoolOwner):
    def __init__(self, name: str, instance: str, layout: KvLayout = LAYOUT, host: Host | None = None) -> None:
        super().__init__(name, CPU, instance, layout, _FILL, host)


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
