"""Attention of a batch that may have several tokens of a sequence, as the model's layers take it."""

from torch import Tensor

from common.model.model_config import ModelConfig
from common.model.transformer import Attend
from kernels.attention import PrefillAttention
from kernels.ops import Ops
from kernels.rope import Rotation


def packed_attention(config: ModelConfig, ops: Ops, batch: PrefillAttention) -> Attend:
    """Rotates and writes the K and V of packed tokens; each attends to what is before it in its sequence."""
    scale = config.head_dim**-0.5

    def attend(qkv: Tensor, rotation: Rotation, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        q, k, v = ops.rope_write_kv(qkv, rotation, key_cache, value_cache)
        return ops.prefill_attention(q, k, v, key_cache, value_cache, batch, scale)

    return attend
