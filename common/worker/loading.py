"""Makes a worker's parts by its settings: loads the model, allocates the pool, and fills in the hello."""

import uuid
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import structlog
import torch

from common.device.cpu_memory import keep_freed_memory
from common.device.devices import choose_device, choose_dtype, choose_kv_dtype
from common.device.gpu_memory import Passes, bytes_for
from common.kv import host_memory, host_room
from common.kv.block_pool import BlockPool
from common.kv.host_cache import HostCache
from common.kv.kv_pool import KvLayout, KvPool, blocks_for, layout_to_proto, view
from common.kv.pool_size import blocks_that_fit
from common.model import fingerprint, model_config, model_files, vocabulary, weights
from common.model.model_config import ModelConfig
from common.model.transformer import Model
from common.network.own_host import host_id
from common.sampling.grammar import CompiledGrammars, GrammarError, load_tokenizer
from common.sampling.guided_sampling import GuidedSampling
from common.transport import create, crosses_hosts
from common.worker.config import WorkerConfig
from common.worker.worker_parts import WorkerParts
from kernels.ops import select
from twostroke.v1 import inference_pb2
from twostroke.v1 import worker_pb2 as pb

log = structlog.get_logger(__name__)


def load(
    config: WorkerConfig, role: "inference_pb2.WorkerRole.ValueType", max_batch: int, passes: Passes
) -> WorkerParts:
    """Loads the model and allocates the pool; on a GPU, leaves room for `passes`.

    Args:
        config: the worker's settings.
        role: prefill or decode.
        max_batch: what routers are told: most tokens in a prefill batch, or most sequences in a decode batch.
        passes: what will be captured as CUDA graphs.

    Raises:
        ModelError: the model cannot be served, or the pool would not hold a single block.
        TransportError: the transport that was asked for does not work here.
        HostMemoryError: the host's memory that was asked for cannot be had.
    """
    if config.host_cache_gib:
        host_room.check(config.host_cache_gib)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    directory = model_files.resolve(config.model, weights=config.load_format != "dummy")
    model = model_config.load_config(directory, config.max_length)
    dtype = choose_dtype(config.dtype, model, device)
    kv_dtype = choose_kv_dtype(config.kv_cache_dtype, dtype, device)
    _warn_of_8_bits(config, model, device)
    if config.load_format == "dummy":
        loaded = weights.dummy(model, dtype, device)
    else:
        loaded = weights.load(directory, model, dtype, device)
    one_block = KvLayout(1, model.num_layers, config.block_size, model.num_kv_heads, model.head_dim, kv_dtype)
    kept_free = bytes_for(passes, model, dtype)
    layout = replace(one_block, num_blocks=config.num_blocks or blocks_that_fit(one_block, device, kept_free))
    instance = uuid.uuid4().hex
    transport = config.transport if config.transport != "auto" else ("cuda_ipc" if device.type == "cuda" else "shm")
    memory = create(transport, layout, device, instance)
    pool = KvPool(layout, view(memory.tensor, layout))
    blocks = BlockPool(layout.num_blocks, memory.generations)
    host_cache = _host_cache(config.host_cache_gib, pool, blocks)
    max_length = min(model.context_length, layout.num_blocks * layout.block_size)
    _log_loaded(config.model, dtype, device, layout, max_length, model.context_length)
    ops = select(device)
    guided = load_guided(directory, model)
    hello = pb.WorkerHello(
        instance=instance,
        role=role,
        model=config.model,
        fingerprint=fingerprint.compute(directory, config.load_format, dtype, layout),
        pool=pb.PoolHandle(
            instance=instance, transport=transport, descriptor=memory.descriptor, layout=layout_to_proto(layout)
        ),
        max_length=max_length,
        max_batch=max_batch,
        version=version("twostroke"),
        dtype=dtype,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        vocabulary=vocabulary.digest(directory),
        host="" if crosses_hosts(transport) else host_id(),
        guides=guided is not None,
        host_blocks=host_cache.slots.num_blocks if host_cache is not None else 0,
    )
    return WorkerParts(Model(model, loaded, ops), ops, pool, memory, blocks, device, hello, guided, host_cache)


def _warn_of_8_bits(config: WorkerConfig, model: ModelConfig, device: torch.device) -> None:
    if model.quantization is not None and device.type == "cpu":
        log.warning("8-bit weights are slow on a CPU: each is made a float32 every time it is used")
    if config.kv_cache_dtype == "fp8" and model.qkv_bias:
        log.warning(
            "keys of a model with biases may be too large for 8-bit floats, and its answers useless: look first"
        )


def _host_cache(gib: float, pool: KvPool, blocks: BlockPool) -> HostCache | None:
    if not gib:
        return None
    slots = host_memory.blocks_in(gib, pool.layout.block_bytes)
    return HostCache(blocks, host_memory.allocate(pool, slots))


def _log_loaded(
    name: str, dtype: str, device: torch.device, layout: KvLayout, max_length: int, context_length: int
) -> None:
    log.info(
        "model loaded",
        model=name,
        dtype=dtype,
        kv_cache_dtype=layout.dtype,
        device=str(device),
        blocks=layout.num_blocks,
        block_size=layout.block_size,
        pool_mib=layout.pool_bytes >> 20,
        max_length=max_length,
    )
    if max_length < context_length:
        log.warning(
            "the pool is smaller than the longest sequence that the model allows; longer requests are refused: set "
            "--num-blocks, or --max-length where that is meant",
            tokens=max_length,
            context_length=context_length,
            num_blocks_for_all=blocks_for(context_length, layout.block_size),
        )


def load_guided(directory: Path, model: ModelConfig) -> GuidedSampling | None:
    """What runs grammars; or None, and a line in the log, if requests with a grammar must be refused."""
    try:
        grammars = CompiledGrammars(load_tokenizer(directory, model))
    except GrammarError as error:
        log.warning("guided output is not served", reason=str(error))
        return None
    return GuidedSampling(grammars, model.vocab_size, torch.get_num_threads())
