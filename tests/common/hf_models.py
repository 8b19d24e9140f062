"""Small random models of every supported architecture, as transformers makes and runs them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from common.model import weights
from common.model.model_config import load_config
from common.model.transformer import Model
from kernels.ops import REFERENCE

_SMALL: dict[str, Any] = {
    "vocab_size": 500,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "dtype": "float32",
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}

CONFIGS = {
    "llama": LlamaConfig(
        **_SMALL, hidden_size=72, num_attention_heads=3, num_key_value_heads=1, head_dim=64, tie_word_embeddings=True
    ),
    "llama3-rope": LlamaConfig(
        **_SMALL,
        hidden_size=100,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=80,
        tie_word_embeddings=False,
        rope_parameters=_LLAMA3,
    ),
    "llama-biases": LlamaConfig(
        **_SMALL, hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64, attention_bias=True
    ),
    "mistral": MistralConfig(
        **_SMALL,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=128,
        tie_word_embeddings=False,
        sliding_window=None,
    ),
    "qwen2": Qwen2Config(
        **_SMALL, hidden_size=448, num_attention_heads=7, num_key_value_heads=1, tie_word_embeddings=True
    ),
    "qwen3": Qwen3Config(
        **_SMALL, hidden_size=88, num_attention_heads=9, num_key_value_heads=3, head_dim=128, tie_word_embeddings=False
    ),
    "qwen3-tied": Qwen3Config(
        **_SMALL, hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=80, tie_word_embeddings=True
    ),
    "mixtral": MixtralConfig(
        **_SMALL,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=5,
        num_experts_per_tok=2,
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **_SMALL | {"head_dim": 80},
        hidden_size=88,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=40,
        num_experts=11,
        num_experts_per_tok=3,
        norm_topk_prob=True,
    ),
    "qwen3-moe-shares": Qwen3MoeConfig(
        **_SMALL,
        hidden_size=64,
        num_attention_heads=1,
        num_key_value_heads=1,
        moe_intermediate_size=72,
        num_experts=4,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "phi3": Phi3Config(**_SMALL, hidden_size=96, num_attention_heads=6, num_key_value_heads=3),
    "smollm3": SmolLM3Config(
        **_SMALL | {"num_hidden_layers": 4},
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        no_rope_layers=[1, 0, 1, 0],
    ),
    "qwen3-yarn": Qwen3Config(
        **_SMALL, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=128, rope_parameters=_YARN
    ),
    "llama-yarn": LlamaConfig(
        **_SMALL,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=80,
        rope_parameters=_YARN | {"beta_fast": 20, "beta_slow": 2.5, "truncate": False, "attention_factor": 0.8},
    ),
    "llama-linear": LlamaConfig(
        **_SMALL,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    ),
}


def save(name: str, directory: Path, max_shard_size: str = "5GB") -> PreTrainedModel:
    """Writes a random model to `directory`."""
    model = random_model(CONFIGS[name], seed=list(CONFIGS).index(name))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Every parameter is random, norms and biases too, and large enough that greedy answers do not repeat one token."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.normal_(offset, 0.3 if parameter.dim() == 1 else 2 * parameter.shape[-1] ** -0.5)
    return model


def load_ours(directory: Path, dtype: str = "float32") -> Model:
    config = load_config(directory)
    return Model(config, weights.load(directory, config, dtype, torch.device("cpu")), REFERENCE)


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """transformers' own answers, each prompt alone."""
    generate: Any = model.generate  # of a mixin that the class has in its subclasses only
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers
