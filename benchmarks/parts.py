"""Workers' parts for one process: a model, and pools in private memory."""

import random
from collections.abc import MutableSequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from common.device.devices import choose_kv_dtype
from common.kv.block_pool import BlockPool
from common.kv.kv_pool import KvLayout, KvPool, view
from common.model import model_config, weights
from common.model.transformer import Model
from common.sampling.guided_sampling import GuidedSampling
from common.worker.worker_parts import WorkerParts
from kernels.fp8 import E4M3
from kernels.ops import Ops, select
from twostroke.v1 import worker_pb2

_BELOW_2 = 0b10111111  # sign, exponent without its first bit, mantissa: any E4M3 that is neither large nor NaN


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Model
    ops: Ops
    device: torch.device
    guided: GuidedSampling | None = None


@dataclass(frozen=True, slots=True)
class PlainMemory:
    """A `PoolMemory` without a transport."""

    tensor: Tensor
    generations: MutableSequence[int]
    descriptor: bytes = field(default=b"")

    def close(self) -> None:
        pass


def load_model(directory: Path, dtype: str, device: torch.device, *, dummy: bool, max_length: int) -> LoadedModel:
    config = model_config.load_config(directory, max_length)
    loaded = weights.dummy(config, dtype, device) if dummy else weights.load(directory, config, dtype, device)
    ops = select(device)
    return LoadedModel(Model(config, loaded, ops), ops, device)


def worker_parts(
    loaded: LoadedModel, num_blocks: int, block_size: int = 16, kv_cache_dtype: str = "auto"
) -> WorkerParts:
    """Parts with a pool of `num_blocks` blocks of noise, allocated in random order, as after hours of service."""
    config = loaded.model.config
    kv_dtype = choose_kv_dtype(kv_cache_dtype, loaded.model.dtype, loaded.device)
    layout = KvLayout(num_blocks, config.num_layers, block_size, config.num_kv_heads, config.head_dim, kv_dtype)
    tensor = torch.empty(layout.pool_bytes, dtype=torch.uint8, device=loaded.device)
    pool = KvPool(layout, view(tensor, layout))
    if pool.tensor.dtype == E4M3:
        tensor.random_().bitwise_and_(_BELOW_2)  # torch draws no normal 8-bit floats
    else:
        pool.tensor.normal_()
    memory = PlainMemory(tensor, [0] * num_blocks)
    blocks = BlockPool(num_blocks, memory.generations)
    shuffled = blocks.allocate(num_blocks)
    random.Random(0).shuffle(shuffled)
    blocks.release(shuffled)
    max_length = min(config.context_length, num_blocks * block_size)
    hello = worker_pb2.WorkerHello(max_length=max_length)
    return WorkerParts(loaded.model, loaded.ops, pool, memory, blocks, loaded.device, hello, loaded.guided)
