"""GPU memory that a worker needs besides weights and pool: for the forward passes that it captures as CUDA graphs, and
for sampling that is not captured."""

from dataclasses import dataclass

import torch

from common.model.dtypes import torch_dtype
from common.model.model_config import ModelConfig

GRAPH_BYTES = 14 << 20  # most that one graph took, whatever its size (Qwen3-0.6B and Llama-3.1-8B on an H100)
# Sampling with penalties, grammars or log-probabilities, for each token of the vocabulary. Of a row: its logits in
# float32, the same again for what a grammar leaves of them, and its place in a table that doubles. For what is done to
# `special_sampling.ROWS_AT_ONCE` rows at once: eight float32 values for each.
SPECIAL_ROW_BYTES = 16
SPECIAL_PART_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Passes:
    """The forward passes that a worker captures, and what it samples from them."""

    tokens: int  # of the largest pass
    rows: int  # of logits in the largest pass
    graphs: int  # number of graphs
    histories: int = 0  # sequences whose tokens are kept beside them
    special_rows: int = 0  # of logits, that may want more than what is captured
    special_parts: int = 0  # of them, under way at once

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(
            self.tokens + other.tokens,
            self.rows + other.rows,
            self.graphs + other.graphs,
            self.histories + other.histories,
            self.special_rows + other.special_rows,
            self.special_parts + other.special_parts,
        )


def bytes_for(passes: Passes, model: ModelConfig, dtype: str) -> int:
    """An upper estimate in bytes.

    The activations of the largest pass count twice: once in the graphs' own memory, and once where the pass runs before
    it is captured. Only one layer's count, because the next layer reuses their memory.
    """
    # q and the output count twice: attention that is split over a sequence keeps partial results in float32
    attention = (4 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    mlp, activated = 3 * model.intermediate_size, model.intermediate_size
    if (routing := model.routing) is not None:
        activated *= routing.per_token
        mlp = activated + routing.per_token * model.hidden_size
    quantized = 0
    if model.quantization is not None:  # what a projection takes, in half as many bytes, beside what it was made from
        quantized = max(activated, model.num_heads * model.head_dim, model.hidden_size) // 2
    activations = passes.tokens * (4 * model.hidden_size + attention + mlp + quantized)
    logits = passes.rows * model.vocab_size
    histories = passes.histories * model.context_length * torch.int32.itemsize
    special = passes.special_rows * SPECIAL_ROW_BYTES + passes.special_parts * SPECIAL_PART_BYTES
    captured = 2 * (activations + logits) * torch_dtype(dtype).itemsize + passes.graphs * GRAPH_BYTES
    return captured + histories + special * model.vocab_size
