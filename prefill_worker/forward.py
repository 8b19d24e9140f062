"""A packed batch through the model, and first tokens drawn from what comes out."""

from dataclasses import dataclass

from torch import Tensor

from common.kv.kv_pool import KvPool
from common.model.transformer import Model
from kernels.ops import Ops
from kernels.rope import Rotation
from prefill_worker.batch import PackedBatch
from prefill_worker.draws import Draws


@dataclass(frozen=True, slots=True)
class Forward:
    """The forward pass as torch operations, to be run eagerly or captured in CUDA graphs."""

    model: Model
    pool: KvPool
    ops: Ops

    def last_hidden(self, batch: PackedBatch) -> Tensor:
        """Runs the model and writes the KV of all tokens. Returns hidden states [B, H] of `batch.last_tokens`."""
        scale = self.model.config.head_dim**-0.5

        def attend(qkv: Tensor, rotation: Rotation, key_cache: Tensor, value_cache: Tensor) -> Tensor:
            q, k, v = self.ops.rope_write_kv(qkv, rotation, key_cache, value_cache)
            return self.ops.prefill_attention(q, k, v, key_cache, value_cache, batch.attention, scale)

        hidden = self.model.forward(batch.tokens, batch.positions, batch.slots, self.pool, attend)
        return hidden.index_select(0, batch.last_tokens)

    def draw(self, logits: Tensor, draws: Draws) -> Tensor:
        """Samples from logits [R, V]. Returns first tokens [R] int32."""
        return self.ops.sample(
            logits, draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.seeds, draws.positions
        )
