"""One model for Llama's family, with MLPs or experts: packed tokens in, hidden states out, K and V into paged pools."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kv.kv_pool import KvPool
from common.model.model_config import ModelConfig
from common.model.rotary import rotary_table, unrotated_table
from common.model.weights import Weights
from kernels.experts import Experts
from kernels.hidden import Hidden
from kernels.ops import FusedLayers, Ops
from kernels.rope import Rotation

# (qkv [T, (Hq + 2 Hkv) * D], rotation, key_cache, value_cache) -> [T, Hq, D]; rotates, writes K and V, attends
Attend = Callable[[Tensor, Rotation, Tensor, Tensor], Tensor]


class Model:
    """A decoder-only transformer. It knows nothing of batches: positions, slots and `attend` say what a token sees."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops) -> None:
        self.config = config
        self._weights = weights
        self._ops = ops
        self.dtype = str(weights.embedding.dtype).removeprefix("torch.")
        self._cos_sin = rotary_table(config).to(weights.embedding.device)
        self._unrotated = unrotated_table(config).to(weights.embedding.device)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor, pool: KvPool, attend: Attend) -> Tensor:
        """Runs T tokens, of any number of sequences, through all layers.

        tokens, positions [T] int32 or int64; slots [T] int32 or int64, where each token's K and V go in `pool` (block *
        block_size + offset; -1: nowhere). Returns [T, H], before the final norm.
        """
        config, weights, ops = self.config, self._weights, self._ops
        eps = config.rms_norm_eps
        hidden = Hidden(F.embedding(tokens, weights.embedding))
        next_norms = [*(layer.attention_norm for layer in weights.layers[1:]), None]
        for index, (layer, next_norm) in enumerate(zip(weights.layers, next_norms, strict=True)):
            key_cache, value_cache = pool.layer(index)
            qkv = ops.norm_linear(hidden, layer.attention_norm, eps, layer.qkv, layer.qkv_bias)
            cos_sin = self._unrotated if index in config.unrotated_layers else self._cos_sin
            rotation = Rotation(positions, cos_sin, slots, layer.q_norm, layer.k_norm, eps)
            attended = attend(qkv, rotation, key_cache, value_cache).flatten(1)
            if isinstance(layer.mlp, Experts):
                hidden = ops.add_linear(hidden, attended, layer.output, layer.output_bias, None)
                hidden = ops.add_experts(hidden, layer.mlp_norm, eps, layer.mlp)
            else:
                hidden = ops.add_linear(hidden, attended, layer.output, layer.output_bias, layer.mlp_norm)
                hidden = ops.add_mlp(hidden, layer.mlp_norm, eps, layer.mlp, next_norm)
        return hidden.states

    def fused_layers(self, pool: KvPool) -> FusedLayers | None:
        """What `forward` does for one token of one sequence, as one operation, where there is one."""
        weights = self._weights
        if self.config.unrotated_layers:  # fused layers have one table
            return None
        return self._ops.fuse_layers(
            weights.layers, weights.embedding, self._cos_sin, self.config.rms_norm_eps, pool.tensor
        )

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H], of what `forward` returned -> [N, V], in the model's dtype."""
        weights = self._weights
        return self._ops.norm_linear(Hidden(hidden), weights.norm, self.config.rms_norm_eps, weights.lm_head, None)
