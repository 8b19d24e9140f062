"""How the constants of the decode attention kernel were chosen: time as a share of the floor, over tiles and splits.

python -m benchmarks.gpu.decode_sweep
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.graph_timing import graph_microseconds
from benchmarks.gpu.kernels import BLOCK_SIZE, DEVICE, LLAMA, QWEN, Caches, Shape, randn, sets_for
from benchmarks.gpu.timing import copy_bytes_per_second
from kernels import triton_attention

TILES = [  # keys a step, warps, stages
    (64, 4, 3),
    (64, 4, 2),
    (64, 4, 4),
    (64, 2, 3),
    (64, 8, 3),
    (32, 4, 3),
    (32, 4, 4),
    (32, 2, 3),
    (32, 2, 4),
    (32, 1, 3),
    (16, 1, 4),
    (128, 4, 2),
    (128, 8, 2),
]
PROGRAMS_PER_SM = [2, 4, 8, 16]
CASES: list[tuple[Shape, int, int]] = [(QWEN, 1, 1024), (QWEN, 64, 1024), (QWEN, 256, 1024), (LLAMA, 64, 1024)]


def attend(q: Tensor, caches: Caches, view: tuple[Tensor, Tensor]) -> Tensor:
    return triton_attention.decode_attention(q, *view, caches.tables, caches.lengths, 0.1)


def always(tile: tuple[int, int, int], _head_dim: int, _dtype: torch.dtype) -> tuple[int, int, int]:
    return tile


def main() -> None:
    bandwidth = copy_bytes_per_second(DEVICE)
    print(torch.cuda.get_device_name(), f"copy {bandwidth / 1e9:.0f} GB/s")
    settings = [(tile, 8) for tile in TILES] + [(TILES[0], programs) for programs in PROGRAMS_PER_SM if programs != 8]
    print("tile, warps, stages; programs/SM", *(f"{shape.name} {batch} x {context}" for shape, batch, context in CASES))
    prepared = []
    for shape, batch, context in CASES:
        moved = batch * context * shape.token_bytes
        caches = Caches.scattered(shape, [context] * batch, sets_for(moved), BLOCK_SIZE, 32_768 // BLOCK_SIZE)
        prepared.append((randn(batch, shape.heads, shape.head_dim), caches, moved / bandwidth * 1e6))
    for tile, programs in settings:
        triton_attention._decode_tile = partial(always, tile)
        triton_attention._PROGRAMS_PER_SM = programs
        shares = []
        for q, caches, floor in prepared:
            microseconds = graph_microseconds([partial(attend, q, caches, view) for view in caches.views])
            shares.append(f"{microseconds:8.1f} us {floor / microseconds:4.0%}")
        print(tile, programs, *shares, flush=True)


if __name__ == "__main__":
    main()
