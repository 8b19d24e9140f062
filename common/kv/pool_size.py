"""How many KV blocks a worker's pool gets if no setting says so."""

import torch

from common.device import cpu_memory
from common.kv.kv_pool import KvLayout
from common.model.model_error import ModelError

# Share that the pool takes of the memory that is free once the weights are loaded.
GPU_POOL_SHARE = 0.85
CPU_POOL_SHARE = 0.1
CPU_POOL_MOST_BYTES = 2 << 30


def blocks_that_fit(layout: KvLayout, device: torch.device, kept_free: int) -> int:
    """How many blocks of `layout` to allocate in the memory that is free now.

    Args:
        layout: of one block; its `num_blocks` does not matter.
        device: where the pool will lie.
        kept_free: bytes to leave free on a GPU.

    Raises:
        ModelError: not even one block fits.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        budget = max(min(int(free * GPU_POOL_SHARE), free - kept_free), 0)
    else:
        budget = min(int(cpu_memory.available_bytes() * CPU_POOL_SHARE), CPU_POOL_MOST_BYTES)
    blocks = budget // layout.block_bytes
    if blocks < 1:
        raise ModelError(
            f"no KV block of {layout.block_bytes} bytes fits the {budget >> 20} MiB that a pool may take; "
            "say how many with --num-blocks, or make room"
        )
    return blocks
