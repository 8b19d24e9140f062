"""One decode step: run the model over one token of every sequence, sample, and advance the batch's state."""

from dataclasses import dataclass

from torch import Tensor

from common.kv.kv_pool import KvPool
from common.model.packed_attention import packed_attention
from common.model.transformer import Model
from decode_worker.batch import BatchState
from kernels.ops import FusedLayers, Ops
from kernels.rope import Rotation


@dataclass(frozen=True, slots=True)
class Stepper:
    """The step as torch operations, to be run eagerly or captured in a CUDA graph."""

    model: Model
    pool: KvPool
    ops: Ops
    fused_layers: FusedLayers | None  # all layers for a batch of one, if there is such a kernel

    def logits(self, state: BatchState) -> Tensor:
        """Runs the model over `state.tokens` [B] and writes their KV. Returns logits [B, V]."""
        return self._run(state)[0]

    def sample(self, state: BatchState, logits: Tensor) -> Tensor:
        """The next token of every row, [B] int32."""
        return self.ops.sample(logits, state.sampling, state.lengths + 1)

    def advance(self, state: BatchState, tokens: Tensor) -> None:
        """Makes `tokens` [B] the input of the next step."""
        self.ops.advance(state.tokens, state.lengths, state.history, tokens)

    def plain(self, state: BatchState) -> Tensor:
        """The whole step, if no sequence wants penalties, biases, log-probabilities or a grammar. Returns tokens [B]
        int32."""
        logits, seq_lens = self._run(state)
        tokens = self.ops.sample(logits, state.sampling, seq_lens)
        self.advance(state, tokens)
        return tokens

    def drafted(self, state: BatchState, count: int) -> Tensor:
        """The whole step with up to `count` drafts behind each token; otherwise as `plain`. Returns the new tokens
        [B, count + 1] int32 of each sequence, then -1."""
        block_size = self.pool.layout.block_size
        rows = self.ops.draft(state.lengths, state.limits, state.history, state.block_tables, count, block_size)
        attend = packed_attention(self.model.config, self.ops, rows.attention)
        hidden = self.model.forward(rows.tokens, rows.positions, rows.slots, self.pool, attend)
        sampling = state.sampling.select(lambda column: column.index_select(0, rows.owners))
        drawn = self.ops.sample(self.model.logits(hidden), sampling, rows.positions + 1)
        return self.ops.accept(state.tokens, state.lengths, state.history, rows, drawn, count)

    def _run(self, state: BatchState) -> tuple[Tensor, Tensor]:
        """Logits [B, V], and the sequences' lengths [B] int32 including the token that was run."""
        positions, slots, seq_lens = self.ops.locate(state.lengths, state.block_tables, self.pool.layout.block_size)
        if self.fused_layers is not None and len(state.tokens) == 1:
            hidden = self.fused_layers(state.tokens, positions, slots, seq_lens, state.block_tables)
            return self.model.logits(hidden), seq_lens
        batch = self.ops.plan_decode(state.block_tables, seq_lens, self.pool.layer(0)[0])
        scale = self.model.config.head_dim**-0.5

        def attend(qkv: Tensor, rotation: Rotation, key_cache: Tensor, value_cache: Tensor) -> Tensor:
            return self.ops.decode_attention(qkv, rotation, key_cache, value_cache, batch, scale)

        hidden = self.model.forward(state.tokens, positions, slots, self.pool, attend)
        return self.model.logits(hidden), seq_lens
