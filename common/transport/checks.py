"""What every transport checks: that a peer's blocks fit, that those asked for are there and unchanged, that a
probe came intact."""

from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b

import numpy as np

from common.kv.block_pool import Generations
from common.kv.kv_pool import KvLayout
from common.transport.interface import TransferFailed, TransportError

PROBE_BYTES = 1 << 16  # known bytes behind a pool, for a reader's first copy


def new_probe() -> tuple[bytes, str]:
    """Bytes to put behind a pool, and the digest by which a reader knows them."""
    probe = np.random.default_rng().bytes(PROBE_BYTES)
    return probe, _digest(probe)


def check_probe(received: bytes, digest: str, instance: str) -> None:
    """Raises TransportError if what was read of a worker's probe does not have its digest."""
    if _digest(received) != digest:
        raise TransportError(f"the probe of worker {instance} was not read intact")


def _digest(probe: bytes) -> str:
    return blake2b(probe, digest_size=16).hexdigest()


def check_layout(where: str, theirs: KvLayout, ours: KvLayout) -> None:
    """Raises TransportError, with both values, where blocks are laid out differently. Numbers of blocks may differ."""
    own = asdict(ours)
    differing = [
        f"{field} is {value} there and {own[field]} here"
        for field, value in asdict(theirs).items()
        if field != "num_blocks" and value != own[field]
    ]
    if differing:
        raise TransportError(
            f"blocks of {where} are laid out differently: {', '.join(differing)}; start all workers with the same "
            "model, --dtype, --kv-cache-dtype and --block-size"
        )


def check_blocks(
    src_blocks: Sequence[int], src_num_blocks: int, dst_blocks: Sequence[int], dst_num_blocks: int
) -> None:
    """Raises TransferFailed unless the lists pair up, and lie inside the peer's pool and this worker's."""
    if len(src_blocks) != len(dst_blocks):
        raise TransferFailed(f"{len(src_blocks)} blocks cannot be read into {len(dst_blocks)}")
    for blocks, num_blocks, pool in (
        (src_blocks, src_num_blocks, "the peer's pool"),
        (dst_blocks, dst_num_blocks, "this worker's pool"),
    ):
        if blocks and not (min(blocks) >= 0 and max(blocks) < num_blocks):
            raise TransferFailed(f"blocks {min(blocks)} to {max(blocks)} are not all among the {num_blocks} of {pool}")


def generations_hold(generations: Generations, blocks: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether each of the `blocks` has the `expected` generation; not if the two differ in length."""
    return len(blocks) == len(expected) and all(
        generations[block] == generation for block, generation in zip(blocks, expected, strict=True)
    )
