"""What the hardware could do at best: operations and bytes that a model cannot do without."""

from collections.abc import Sequence

from common.model.model_config import ModelConfig

VALUE_BYTES = 2  # bfloat16


def layer_parameters(config: ModelConfig, tokens: int = 1) -> float:
    """Weights of all layers' matrices that so many tokens go through. Of experts, those that are chosen at least once
    if every one is as likely as any other."""
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (heads + 2 * kv_heads) + heads * config.hidden_size
    mlp: float = 3 * config.hidden_size * config.intermediate_size
    if (routing := config.routing) is not None:
        chosen = routing.experts * (1 - (1 - routing.per_token / routing.experts) ** tokens)
        mlp = chosen * mlp + routing.experts * config.hidden_size
    return config.num_layers * (attention + mlp)


def weight_bytes(config: ModelConfig, tokens: int = 1) -> float:
    """What one step of so many tokens reads of the weights: every matrix once, of an untied embedding only a few
    rows."""
    return VALUE_BYTES * (layer_parameters(config, tokens) + config.vocab_size * config.hidden_size)


def kv_bytes(config: ModelConfig) -> int:
    """K and V of one token in all layers."""
    return VALUE_BYTES * 2 * config.num_layers * config.num_kv_heads * config.head_dim


def decode_step_bytes(config: ModelConfig, contexts: Sequence[int]) -> float:
    """Bytes that a step of sequences with so many tokens each must read."""
    return weight_bytes(config, len(contexts)) + sum(contexts) * kv_bytes(config)


def prefill_operations(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Floating-point operations over whole prompts: two for each weight and token, causal attention, and one row of
    logits a prompt."""
    tokens = sum(lengths)
    attention = sum(2 * config.num_heads * config.head_dim * length * (length + 1) for length in lengths)
    logits = 2 * config.vocab_size * config.hidden_size * len(lengths)
    return 2.0 * layer_parameters(config) * tokens + config.num_layers * attention + logits


def workload_seconds(
    config: ModelConfig, lengths: Sequence[tuple[int, int]], bytes_per_second: float, operations_per_second: float
) -> float:
    """All prompts at once, then decode steps of all that are left, for (prompt, output) `lengths` in tokens."""
    seconds = prefill_operations(config, [prompt for prompt, _ in lengths]) / operations_per_second
    for step in range(1, max(output for _, output in lengths)):
        contexts = [prompt + step for prompt, output in lengths if output > step]
        operations = 2.0 * weight_bytes(config) / VALUE_BYTES * len(contexts)
        seconds += max(decode_step_bytes(config, contexts) / bytes_per_second, operations / operations_per_second)
    return seconds
