"""Model directories without weights, for `--load-format dummy`: config.json, and a tokenizer of made-up words."""

import json
from pathlib import Path
from typing import Any

from cyclopts import App
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.cluster import Flags

_COMMON = {"hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16"}

_QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
}

_LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "eos_token_id": 128001,
}
_QWEN3_30B_A3B = _QWEN3_0_6B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
_BLOCKS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
_EIGHT_BITS = {"num_bits": 8, "type": "float", "symmetric": True}
_CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _EIGHT_BITS | {"strategy": "channel", "dynamic": False},
            "input_activations": _EIGHT_BITS | {"strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
}

# Shapes as published with the models of these names; "tiny" is for trying the scripts on a CPU.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _QWEN3_0_6B,
    "llama-3.1-8b": _LLAMA_3_1_8B,
    "llama-3.1-8b-fp8": _LLAMA_3_1_8B | {"quantization_config": _CHANNELS},
    "qwen3-1.7b": _QWEN3_0_6B | {"hidden_size": 2048, "intermediate_size": 6144},
    "qwen3-4b": _QWEN3_0_6B
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "qwen3-14b": _QWEN3_0_6B
    | {
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "tie_word_embeddings": False,
    },
    "qwen3-8b-fp8": _QWEN3_0_6B
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
        "quantization_config": _BLOCKS,
    },
    "qwen3-30b-a3b": _QWEN3_30B_A3B,
    "qwen3-30b-a3b-fp8": _QWEN3_30B_A3B | {"quantization_config": _BLOCKS},
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "eos_token_id": 151645,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
        "eos_token_id": 128001,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    },
    "tiny": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 12000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "eos_token_id": 11999,
    },
}


def write(name: str, directory: Path) -> Path:
    """Writes the model called `name` into `directory`/`name`. Returns that."""
    target = directory / name
    target.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[name]
    (target / "config.json").write_text(json.dumps(_COMMON | shape, indent=1))
    _tokenizer(shape["vocab_size"]).save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return target


def dtype(device: str) -> str:
    """Of the figures: what a CPU computes with is for trying the scripts."""
    return "float32" if device == "cpu" else "bfloat16"


def worker(model: Path, device: str, max_length: int) -> Flags:
    """Flags of a worker that serves a directory of `write` on a device of this kind."""
    return {"model": model, "load-format": "dummy", "dtype": dtype(device), "max-length": max_length}


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level; ids behind the 256 bytes are words of a few letters, so that a token costs what a real one does."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [f"\u0120w{index}" for index in range(vocab_size - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


app = App(name="models", help_format="plaintext")


@app.default
def main(directory: Path, *names: str) -> None:
    """Writes model directories (all shapes where none is named) under a folder."""
    for name in names or SHAPES:
        print(write(name, directory))


if __name__ == "__main__":
    app()
