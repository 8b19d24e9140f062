"""Chunks of many prompts as one packed batch of tensors."""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from common.device_io import to_device
from kernels.attention import PrefillAttention
from prefill_worker.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """T tokens of B chunks, one after another."""

    tokens: Tensor  # [T] int32
    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int64, where each token's K and V go: block * block_size + offset
    attention: PrefillAttention
    last_tokens: Tensor  # [L] int64, the rows that end a prompt


def pack(chunks: list[Chunk], block_size: int, device: torch.device) -> PackedBatch:
    query_lens = tuple(chunk.end - chunk.start for chunk in chunks)
    kv_lens = tuple(chunk.end for chunk in chunks)
    positions = np.concatenate([np.arange(chunk.start, chunk.end, dtype=np.int32) for chunk in chunks])
    tokens = np.concatenate(
        [np.asarray(chunk.prompt.spec.token_ids[chunk.start : chunk.end], dtype=np.int32) for chunk in chunks]
    )
    block_tables = np.zeros((len(chunks), -(-max(kv_lens) // block_size)), dtype=np.int32)
    slots = np.empty(len(tokens), dtype=np.int64)
    ends = list(accumulate(query_lens))
    for row, (chunk, end) in enumerate(zip(chunks, ends, strict=True)):
        table = np.asarray(chunk.prompt.blocks[: -(-chunk.end // block_size)], dtype=np.int32)
        block_tables[row, : len(table)] = table
        position = positions[end - query_lens[row] : end]
        slots[end - query_lens[row] : end] = table[position // block_size].astype(np.int64) * block_size + (
            position % block_size
        )
    last_tokens = np.asarray(
        [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.is_last], dtype=np.int64
    )
    return PackedBatch(
        tokens=to_device(tokens, device),
        positions=to_device(positions, device),
        slots=to_device(slots, device),
        attention=PrefillAttention(
            query_lens=query_lens,
            kv_lens=kv_lens,
            cu_query_lens=to_device(np.asarray([0, *ends], dtype=np.int32), device),
            cu_kv_lens=to_device(np.asarray([0, *accumulate(kv_lens)], dtype=np.int32), device),
            block_tables=to_device(block_tables, device),
        ),
        last_tokens=to_device(last_tokens, device),
    )
