"""Blocks in a CPU's memory as rows of bytes, and copies between them."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from common.kv.kv_pool import KvPool

Rows = npt.NDArray[np.uint8]  # [num_blocks, block_bytes]; numpy has no bfloat16, and a copy needs no dtype


def of_pool(pool: KvPool) -> Rows:
    """The blocks of a pool on a CPU, sharing its memory."""
    rows: Rows = pool.tensor.view(torch.uint8).view(pool.layout.num_blocks, pool.layout.block_bytes).numpy()
    return rows


def copy(source: Rows, src_blocks: Sequence[int], target: Rows, dst_blocks: Sequence[int]) -> None:
    """Copies block src_blocks[i] of `source` to block dst_blocks[i] of `target`."""
    for src, dst, count in runs(src_blocks, dst_blocks):
        target[dst : dst + count] = source[src : src + count]  # numpy releases the GIL


def runs(src_blocks: Sequence[int], dst_blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of blocks that are consecutive on both sides, as (source, target, count)."""
    start = 0
    for end in range(1, len(src_blocks) + 1):
        length = end - start
        if (
            end == len(src_blocks)
            or src_blocks[end] != src_blocks[start] + length
            or dst_blocks[end] != dst_blocks[start] + length
        ):
            yield src_blocks[start], dst_blocks[start], length
            start = end
