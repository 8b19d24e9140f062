"""A packed batch through the model, and first tokens drawn from what comes out."""

from dataclasses import dataclass

from torch import Tensor

from common.kv.kv_pool import KvPool
from common.model.packed_attention import packed_attention
from common.model.transformer import Model
from kernels.ops import Ops
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
        attend = packed_attention(self.model.config, self.ops, batch.attention)
        hidden = self.model.forward(batch.tokens, batch.positions, batch.slots, self.pool, attend)
        return hidden.index_select(0, batch.last_tokens)

    def draw(self, logits: Tensor, draws: Draws) -> Tensor:
        """Samples from logits [R, V]. Returns first tokens [R] int32."""
        return self.ops.sample(logits, draws.rows, draws.positions)
