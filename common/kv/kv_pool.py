"""The KV cache of a worker: one allocation, of blocks that hold all layers of a few tokens, contiguous."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.model.dtypes import torch_dtype
from twostroke.v1 import worker_pb2 as pb


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of a pool: [num_blocks, num_layers, 2 (K, V), block_size, num_kv_heads, head_dim]."""

    num_blocks: int
    num_layers: int
    block_size: int  # tokens
    num_kv_heads: int
    head_dim: int
    dtype: str  # the model's, or "float8_e4m3fn"

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        return (self.num_blocks, self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        values = self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim
        return values * torch_dtype(self.dtype).itemsize

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that so many tokens take; the last one may be partly filled."""
    return -(-tokens // block_size)


def view(memory: Tensor, layout: KvLayout) -> Tensor:
    """`memory` (contiguous, layout.pool_bytes bytes of any dtype) as a tensor of layout.shape, sharing storage."""
    return memory.view(torch.uint8).view(torch_dtype(layout.dtype)).view(layout.shape)


class KvPool:
    """A pool's tensor and the caches of its layers.

    Args:
        layout: the pool's shape.
        tensor: memory of that shape and dtype.
    """

    def __init__(self, layout: KvLayout, tensor: Tensor) -> None:
        self.layout = layout
        self.tensor = tensor
        self._layers = tuple((tensor[:, i, 0], tensor[:, i, 1]) for i in range(layout.num_layers))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer: strided views [num_blocks, block_size, num_kv_heads, head_dim]."""
        return self._layers[index]


def allocate(layout: KvLayout, device: torch.device) -> KvPool:
    """A zeroed pool in private memory. Workers get theirs from a transport, so that peers can read it."""
    return KvPool(layout, torch.zeros(layout.shape, dtype=torch_dtype(layout.dtype), device=device))


def layout_to_proto(layout: KvLayout) -> pb.KvLayout:
    """The layout as routers are told of it."""
    return pb.KvLayout(
        num_blocks=layout.num_blocks,
        num_layers=layout.num_layers,
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
    )
