"""What every worker is made of: a model on a device, a pool of KV blocks, and the hello that it greets routers with."""

from dataclasses import dataclass

import torch

from common.kv.block_pool import BlockPool
from common.kv.host_cache import HostCache
from common.kv.kv_pool import KvPool
from common.model.dtypes import torch_dtype
from common.model.transformer import Model
from common.sampling import guided_sampling, special_sampling
from common.sampling.guided_sampling import GrammarState, GuidedSampling
from common.sequence import SequenceSpec
from common.transport import PoolMemory
from kernels.ops import Ops
from twostroke.v1 import inference_pb2
from twostroke.v1 import worker_pb2 as pb


@dataclass(frozen=True, slots=True)
class WorkerParts:
    model: Model
    ops: Ops
    pool: KvPool
    memory: PoolMemory
    blocks: BlockPool
    device: torch.device
    hello: pb.WorkerHello
    guided: GuidedSampling | None = None  # None: grammars are not supported with this model's files
    host_cache: HostCache | None = None

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence, prompt and output together."""
        return self.hello.max_length

    @property
    def caches(self) -> tuple[BlockPool, ...]:
        """The pools in which a prompt's blocks may be found: that of the device, and that in host memory."""
        return (self.blocks,) if self.host_cache is None else (self.blocks, self.host_cache.slots)

    def check(self, spec: SequenceSpec, length: int) -> None:
        """Raises ValueError, with a sentence, if a sequence of up to `length` tokens cannot be served here."""
        if length > self.max_length:
            raise ValueError(f"{length} tokens do not fit; the longest sequence here has {self.max_length}")
        if len(spec.block_hashes) != len(spec.token_ids) // self.pool.layout.block_size:
            raise ValueError(f"{len(spec.block_hashes)} block hashes came with {len(spec.token_ids)} tokens")
        vocab_size = self.model.config.vocab_size
        if max((*spec.token_ids, *spec.stop_token_ids)) >= vocab_size:
            raise ValueError(f"a token is not in the vocabulary of {vocab_size}")
        spec.sampling.check(vocab_size)
        if spec.grammar and self.guided is None:
            raise ValueError("output cannot be made to follow a grammar here; the worker's log says why")

    def grammar_state(self, spec: SequenceSpec) -> GrammarState | None:
        """The grammar state of a sequence that `check` let through; None if it follows no grammar."""
        return self.guided.begin(spec) if self.guided is not None and spec.grammar else None

    def warm_up_sampling(self, most_rows: int) -> None:
        """Does everything that can be done to logits once, so that no request waits while kernels are compiled, and too
        little memory for `most_rows` rows shows now."""
        vocab_size, dtype = self.model.config.vocab_size, torch_dtype(self.model.dtype)
        special_sampling.warm_up(self.ops.sample, most_rows, vocab_size, dtype, self.device)
        guided_sampling.warm_up(most_rows, vocab_size, dtype, self.device)

    def blocks_load(self, reserved: int) -> inference_pb2.Blocks:
        return _counts(self.blocks, reserved)

    @property
    def host_blocks_load(self) -> inference_pb2.Blocks | None:
        return _counts(self.host_cache.slots) if self.host_cache is not None else None

    def turn_host_cache(self) -> None:
        """See `HostCache.turn`; nothing where no host memory is kept."""
        if self.host_cache is not None:
            self.host_cache.turn()

    def close(self) -> None:
        try:
            if self.host_cache is not None:
                self.host_cache.close()
        finally:
            self.memory.close()


def _counts(blocks: BlockPool, reserved: int = 0) -> inference_pb2.Blocks:
    return inference_pb2.Blocks(
        total=blocks.num_blocks,
        free=blocks.free_count,
        cached=blocks.cached_count,
        in_use=blocks.in_use_count,
        reserved=reserved,
    )
