"""One decode step: the model over one token of every sequence, sampling, and the state moved on to the next token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.kv_pool import KvPool
from common.model import Model
from decode_worker.batch import BatchState
from kernels.ops import Ops


@dataclass(frozen=True, slots=True)
class Stepper:
    """The step as torch operations, for eager use and for capture in a CUDA graph."""

    model: Model
    pool: KvPool
    ops: Ops

    def logits(self, state: BatchState) -> Tensor:
        """Runs the model over `state.tokens` [B] and writes their KV. Returns logits [B, V]."""
        block_size = self.pool.layout.block_size
        positions = state.lengths.clamp_min(0)
        block = state.block_tables.gather(1, (positions // block_size).long().unsqueeze(1)).squeeze(1)
        slots = torch.where(state.lengths >= 0, block.long() * block_size + positions % block_size, -1)
        seq_lens = state.lengths + 1
        scale = self.model.config.head_dim**-0.5

        def attend(q: Tensor, _k: Tensor, _v: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
            return self.ops.decode_attention(q, key_cache, value_cache, state.block_tables, seq_lens, scale)

        return self.model.logits(self.model.forward(state.tokens, positions, slots, self.pool, attend))

    def sample(self, state: BatchState, logits: Tensor) -> Tensor:
        """The next token of every row, [B] int32."""
        return self.ops.sample(
            logits, state.temperature, state.top_k, state.top_p, state.min_p, state.seeds, state.lengths + 1
        )

    def advance(self, state: BatchState, tokens: Tensor) -> None:
        """Makes `tokens` those that the next step consumes."""
        state.tokens.copy_(tokens)
        state.lengths.add_(state.lengths >= 0)

    def plain(self, state: BatchState) -> Tensor:
        """The whole step, for batches without penalties, biases and logprobs."""
        tokens = self.sample(state, self.logits(state))
        self.advance(state, tokens)
        return tokens
