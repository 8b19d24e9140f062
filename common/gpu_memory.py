"""GPU memory that a worker needs beside weights and pool: for the passes that it captures as CUDA graphs."""

from dataclasses import dataclass

from common.dtypes import torch_dtype
from common.model_config import ModelConfig

GRAPH_BYTES = 14 << 20  # of one captured pass, whatever its size, at most (Qwen3-0.6B and Llama-3.1-8B on an H100)


@dataclass(frozen=True, slots=True)
class Passes:
    """What a worker captures."""

    tokens: int  # of the largest pass
    rows: int  # of logits, at most
    graphs: int

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.tokens + other.tokens, self.rows + other.rows, self.graphs + other.graphs)


def bytes_for(passes: Passes, model: ModelConfig, dtype: str) -> int:
    """An estimate from above. Every activation of the largest pass counts twice: once in the graphs' own memory, once
    where the pass runs before its capture. Of one size there is one, as the next layer takes the place of the last."""
    # q and the output, each a second time: the pieces of sequences whose attention is cut, in float32
    attention = (4 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    activations = passes.tokens * (4 * model.hidden_size + attention + 3 * model.intermediate_size)
    logits = passes.rows * model.vocab_size
    return 2 * (activations + logits) * torch_dtype(dtype).itemsize + passes.graphs * GRAPH_BYTES
