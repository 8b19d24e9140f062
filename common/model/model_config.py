"""A model's config.json, checked: whatever is not supported is refused by name. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.model import quantization, rope_scaling
from common.model.config_values import number, object_of, positive
from common.model.model_error import ModelError
from common.model.quantization import Quantization
from common.model.rope_scaling import RopeScaling, YarnScaling

DTYPES = ("float32", "bfloat16", "float16")

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}

# What transformers takes for a sliding window that config.json does not mention; null is none.
_USUAL_WINDOW = 4096


@dataclass(frozen=True, slots=True)
class Routing:
    """How a mixture of experts chooses, for each token, the MLPs that it goes through."""

    experts: int
    per_token: int
    normalized: bool  # whether the shares of a token's experts add up to 1


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer of Llama's family."""

    architecture: str  # as in config.json, "LlamaForCausalLM"
    dtype: str  # that the weights are stored in, or those that are not quantized
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the MLP, or of one expert
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int  # tokens of the longest sequence
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    qk_norm: bool
    routing: Routing | None  # None: every layer has one MLP
    quantization: Quantization | None  # None: all weights are of `dtype`
    eos_token_ids: tuple[int, ...]


def load_config(directory: Path, max_length: int | None = None, *, to_run: bool = True) -> ModelConfig:
    """Reads `directory`/config.json, and generation_config.json for its end-of-sequence tokens.

    Args:
        directory: a Hugging Face directory.
        max_length: lowers the context length, in tokens.
        to_run: False for the router, which does not run the model: whether a sliding window is shorter than sequences
            may get is then left to the workers.

    Raises:
        ModelError: a file cannot be read, or the model is not supported.
    """
    raw = read_json(directory / "config.json")
    generation_file = directory / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    return parse_config(raw, generation, max_length, to_run=to_run)


def parse_config(
    raw: dict[str, Any], generation: dict[str, Any] | None = None, max_length: int | None = None, *, to_run: bool = True
) -> ModelConfig:
    """Like `load_config`, for files that have been read already."""
    architecture = _architecture(raw)
    family = _ARCHITECTURES[architecture]
    _refuse_unsupported(raw)

    vocab_size = positive(raw, "vocab_size")
    hidden_size = positive(raw, "hidden_size")
    num_heads = positive(raw, "num_attention_heads")
    num_kv_heads = positive(raw, "num_key_value_heads", num_heads)
    head_dim = positive(raw, "head_dim", 128 if family == "qwen3" else hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})"
        )
    if head_dim % 2:
        raise ModelError(f"head_dim is {head_dim}; rotary embeddings need an even one")

    rope_theta, scaling = rope_scaling.parse(raw, 1e6 if family == "mixtral" else 1e4)
    context_length = positive(raw, "max_position_embeddings")
    if isinstance(scaling, YarnScaling):
        context_length = max(context_length, scaling.context_length)
    if max_length is not None:
        if not 0 < max_length <= context_length:
            raise ModelError(f"a maximum length of {max_length} is outside the model's 1 to {context_length} tokens")
        context_length = max_length
    if to_run:
        _refuse_sliding_window(raw, family, context_length)

    attention_bias = bool(raw.get("attention_bias", False)) and family in ("llama", "qwen3", "qwen3_moe")
    routing = _routing(raw, family)
    quantized = object_of(raw, "quantization_config")
    return ModelConfig(
        architecture=architecture,
        dtype=_dtype(raw),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=positive(raw, "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"),
        num_layers=positive(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        context_length=context_length,
        rms_norm_eps=number(raw, "rms_norm_eps", 1e-5 if family == "mixtral" else 1e-6),
        rope_theta=rope_theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        routing=routing,
        quantization=quantization.parse(quantized) if quantized else None,
        eos_token_ids=_eos_token_ids(raw, generation or {}, vocab_size),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError if it cannot be read or holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return content


def _architecture(raw: dict[str, Any]) -> str:
    named = raw.get("architectures") or []
    if not isinstance(named, list):
        raise ModelError(f"config.json must give architectures as a list; it gives {named!r}")
    for architecture in named:
        if isinstance(architecture, str) and architecture in _ARCHITECTURES:
            # transformers goes by model_type, and would make another model of the same weights.
            model_type = raw.get("model_type")
            if model_type not in (None, _ARCHITECTURES[architecture]):
                raise ModelError(
                    f"config.json names the architecture {architecture} and the model_type {model_type!r}, "
                    "which contradict each other"
                )
            return architecture
    what = f"the architecture {', '.join(map(str, named))}" if named else "a config.json that names no architecture"
    raise ModelError(f"{what} is not supported; supported are {', '.join(_ARCHITECTURES)}")


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"hidden_act {activation!r} is not supported; supported is 'silu'")
    if raw.get("mlp_bias"):
        raise ModelError("mlp_bias is not supported: the MLP's projections must have no biases")


def _routing(raw: dict[str, Any], family: str) -> Routing | None:
    if family not in ("mixtral", "qwen3_moe"):
        return None
    if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
        raise ModelError("mlp_only_layers and decoder_sparse_step are not supported: every layer must have experts")
    # transformers writes either name for either model
    experts = positive(raw, "num_local_experts" if raw.get("num_experts") is None else "num_experts")
    per_token = positive(raw, "num_experts_per_tok")
    if per_token > experts:
        raise ModelError(f"num_experts_per_tok ({per_token}) is more than there are experts ({experts})")
    return Routing(experts, per_token, normalized=family == "mixtral" or bool(raw.get("norm_topk_prob", False)))


def _dtype(raw: dict[str, Any]) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ModelError(f"weights of dtype {dtype} are not supported; supported are {', '.join(DTYPES)}")
    return dtype


def _refuse_sliding_window(raw: dict[str, Any], family: str, context_length: int) -> None:
    """Refuses windows that are shorter than the context; longer ones change nothing."""
    usual = None if family == "mixtral" else _USUAL_WINDOW
    window = None if raw.get("sliding_window", usual) is None else positive(raw, "sliding_window", usual)
    in_use = family in ("mistral", "mixtral") or bool(raw.get("use_sliding_window", False))
    if family != "llama" and in_use and window is not None and window < context_length:
        raise ModelError(
            f"sliding-window attention ({window} tokens) is not supported; "
            f"limit the context of {context_length} tokens to the window with --max-length {window}"
        )


def _eos_token_ids(raw: dict[str, Any], generation: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    ids: set[int] = set()
    for source in (raw, generation):
        named = source.get("eos_token_id")
        for token in named if isinstance(named, list) else [] if named is None else [named]:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise ModelError(f"eos_token_id {token!r} is not in the vocabulary of {vocab_size} tokens")
            ids.add(token)
    return tuple(sorted(ids))
