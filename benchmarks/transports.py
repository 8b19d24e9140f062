"""How fast each transport reads blocks of another process's pool: 1, 64 and 512 of them, in random order.

python -m benchmarks.transports shm nixl
python -m benchmarks.transports cuda_ipc nixl --owner cuda:0 --reader cuda:1
UCX_TLS=tcp,cuda_copy python -m benchmarks.transports nixl --owner cuda:0 --reader cuda:1
"""

import os
import random
import sys
from typing import Annotated

import cyclopts
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.pool_owner import pool_owner
from common import transport
from common.kv.kv_pool import KvLayout, KvPool, view

# Qwen3-0.6B's in bfloat16: 1.75 MiB a block of 16 tokens
LAYOUT = KvLayout(num_blocks=600, num_layers=28, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
COUNTS = (1, 64, 512)
REPEATS = 7

app = cyclopts.App(help=__doc__)


def _milliseconds(peer: transport.PeerPool, pool: KvPool, count: int) -> float:
    """The median of some reads."""
    draw = random.Random(count)
    taken = []
    for _ in range(REPEATS):
        transfer = peer.read(
            draw.sample(range(LAYOUT.num_blocks), count), pool, draw.sample(range(LAYOUT.num_blocks), count)
        )
        transfer.wait()
        taken.append(transfer.milliseconds)
    return sorted(taken)[REPEATS // 2]


@app.default
def main(
    *transports: Annotated[str, cyclopts.Parameter(help="shm, cuda_ipc or nixl")],
    owner: Annotated[str, cyclopts.Parameter(help="device of the pool that is read")] = "cpu",
    reader: Annotated[str, cyclopts.Parameter(help="device that reads")] = "cpu",
) -> None:
    """Measures the transports, one after the other."""
    device = torch.device(reader)
    table = Table(title=f"{owner} to {reader}, blocks of {LAYOUT.block_bytes / (1 << 20):g} MiB")
    for column in ("transport", "UCX_TLS", "blocks", "ms", "GB/s"):
        table.add_column(column, justify="right")
    for name in transports:
        with pool_owner(name, LAYOUT, torch.device(owner)) as descriptor:
            memory = transport.create(name, LAYOUT, device, f"reader-{os.getpid()}")
            pool = KvPool(LAYOUT, view(memory.tensor, LAYOUT))
            peer = transport.open_peer(descriptor, name, LAYOUT, device)
            everything = range(LAYOUT.num_blocks)
            peer.read(everything, pool, everything).wait()  # touches all pages, which then cost no more
            for count in COUNTS:
                taken = _milliseconds(peer, pool, count)
                speed = count * LAYOUT.block_bytes / taken / 1e6
                ways = os.environ.get("UCX_TLS", "all") if name == "nixl" else ""
                table.add_row(name, ways, str(count), f"{taken:.2f}", f"{speed:.1f}")
            peer.close()
            memory.close()
    Console(file=sys.stdout).print(table)


if __name__ == "__main__":
    app()
