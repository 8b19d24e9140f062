"""What the hardware could do at best: operations and bytes that a model cannot do without.

Operations are counted in those of a bfloat16 GEMM, as their ceiling is the rate of one. Those on 8-bit floats take half
as long, and count half.
"""

from collections.abc import Sequence

from common.model.model_config import ModelConfig
from common.model.quantization import BLOCK

VALUE_BYTES = 2  # bfloat16
SCALE_BYTES = 4  # float32


def layer_parameters(config: ModelConfig, tokens: int = 1) -> float:
    """Weights of all layers' matrices that so many tokens go through. Of experts, those that are chosen at least once
    if every one is as likely as any other."""
    return _projections(config, tokens) + _routers(config)


def _projections(config: ModelConfig, tokens: int) -> float:
    """Those of `layer_parameters` that are 8-bit floats in a quantized model."""
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (heads + 2 * kv_heads) + heads * config.hidden_size
    mlp: float = 3 * config.hidden_size * config.intermediate_size
    if (routing := config.routing) is not None:
        mlp *= routing.experts * (1 - (1 - routing.per_token / routing.experts) ** tokens)
    return config.num_layers * (attention + mlp)


def _routers(config: ModelConfig) -> int:
    return 0 if config.routing is None else config.num_layers * config.routing.experts * config.hidden_size


def weight_bytes(config: ModelConfig, tokens: int = 1) -> float:
    """What one step of so many tokens reads of the weights: every matrix once, of an untied embedding only a few
    rows. Of scales those of blocks; one for each output is less than a thousandth."""
    value: float = VALUE_BYTES
    if (quantization := config.quantization) is not None:
        value = 1 + (SCALE_BYTES / BLOCK**2 if quantization.in_blocks else 0)
    others = _routers(config) + config.vocab_size * config.hidden_size
    return value * _projections(config, tokens) + VALUE_BYTES * others


def kv_bytes(config: ModelConfig, value_bytes: int = VALUE_BYTES) -> int:
    """K and V of one token in all layers."""
    return value_bytes * 2 * config.num_layers * config.num_kv_heads * config.head_dim


def decode_step_bytes(config: ModelConfig, contexts: Sequence[int], value_bytes: int = VALUE_BYTES) -> float:
    """Bytes that a step of sequences with so many tokens each must read. `value_bytes`: of an element of K or V."""
    return weight_bytes(config, len(contexts)) + sum(contexts) * kv_bytes(config, value_bytes)


def prefill_operations(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Floating-point operations over whole prompts: two for each weight and token, causal attention, and one row of
    logits a prompt."""
    attention = sum(2 * config.num_heads * config.head_dim * length * (length + 1) for length in lengths)
    products = _layer_operations(config) * sum(lengths) + _logits_operations(config) * len(lengths)
    return products + config.num_layers * attention


def _layer_operations(config: ModelConfig) -> float:
    """Of a token, in all products with weights of the layers."""
    share = 1.0 if config.quantization is None else 0.5
    return 2 * (share * _projections(config, 1) + _routers(config))


def _logits_operations(config: ModelConfig) -> int:
    return 2 * config.vocab_size * config.hidden_size


def workload_seconds(
    config: ModelConfig, lengths: Sequence[tuple[int, int]], bytes_per_second: float, operations_per_second: float
) -> float:
    """All prompts at once, then decode steps of all that are left, for (prompt, output) `lengths` in tokens."""
    seconds = prefill_operations(config, [prompt for prompt, _ in lengths]) / operations_per_second
    for step in range(1, max(output for _, output in lengths)):
        contexts = [prompt + step for prompt, output in lengths if output > step]
        operations = (_layer_operations(config) + _logits_operations(config)) * len(contexts)
        seconds += max(decode_step_bytes(config, contexts) / bytes_per_second, operations / operations_per_second)
    return seconds
