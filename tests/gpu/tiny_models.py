"""Small random models of every architecture, written by transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCAB_SIZE = 503
_COMMON = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 3, "max_position_embeddings": 1024, "initializer_range": 0.1}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 128}

_EXPERTS = {"num_experts": 24, "num_experts_per_tok": 4, "moe_intermediate_size": 72, "norm_topk_prob": True}


def _shape(heads: int, kv_heads: int, head_dim: int, *, tied: bool) -> dict[str, Any]:
    return _COMMON | {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": heads * head_dim,
        "intermediate_size": 2 * heads * head_dim + 16,
        "tie_word_embeddings": tied,
    }


MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, _shape(9, 3, 64, tied=True)),
    "llama3-rope": (LlamaConfig, LlamaForCausalLM, _shape(4, 1, 128, tied=False) | {"rope_parameters": _LLAMA3}),
    "mistral": (MistralConfig, MistralForCausalLM, _shape(4, 4, 80, tied=False) | {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, _shape(7, 1, 64, tied=True)),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, _shape(6, 2, 128, tied=False)),
    "qwen3-96": (Qwen3Config, Qwen3ForCausalLM, _shape(5, 5, 96, tied=True)),
    "mixtral": (MixtralConfig, MixtralForCausalLM, _shape(3, 1, 64, tied=False)),
    "smollm3-yarn": (
        SmolLM3Config,
        SmolLM3ForCausalLM,
        _shape(4, 2, 64, tied=True)
        | {"no_rope_layers": [1, 0, 1], "rope_parameters": _YARN, "pad_token_id": 0, "eos_token_id": 2},
    ),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, _shape(4, 2, 64, tied=True) | _EXPERTS),
}


def write(name: str, directory: Path) -> Path:
    config_class, model_class, shape = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class(**shape))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif parameter_name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.1)
    model.save_pretrained(directory)
    return directory
