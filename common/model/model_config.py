"""A model's config.json, checked: whatever is not supported is refused by name. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.model import quantization, rope_scaling
from common.model.config_values import number, object_of, positive
from common.model.families import FAMILIES, Family, Window
from common.model.model_error import ModelError
from common.model.quantization import Quantization
from common.model.rope_scaling import RopeScaling, YarnScaling

DTYPES = ("float32", "bfloat16", "float16")


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
    joined_projections: bool  # q, k and v, and gate and up, are stored as one matrix each
    unrotated_layers: frozenset[int]  # whose q and k are not rotated
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
    family = FAMILIES[architecture]
    _refuse_unsupported(raw)

    vocab_size = positive(raw, "vocab_size")
    hidden_size = positive(raw, "hidden_size")
    num_layers = positive(raw, "num_hidden_layers")
    num_heads = positive(raw, "num_attention_heads")
    num_kv_heads = positive(raw, "num_key_value_heads", num_heads)
    head_dim = positive(raw, "head_dim", family.usual_head_dim or hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})"
        )
    if head_dim % 2:
        raise ModelError(f"head_dim is {head_dim}; rotary embeddings need an even one")

    rope_theta, scaling = rope_scaling.parse(raw, family.usual_theta)
    context_length = positive(raw, "max_position_embeddings")
    if isinstance(scaling, YarnScaling):
        context_length = max(context_length, scaling.context_length)
    if max_length is not None:
        if not 0 < max_length <= context_length:
            raise ModelError(f"a maximum length of {max_length} is outside the model's 1 to {context_length} tokens")
        context_length = max_length
    if to_run:
        _refuse_sliding_window(raw, family, context_length)

    attention_bias = family.may_have_biases and bool(raw.get("attention_bias", False))
    routing = _routing(raw, family)
    quantized = object_of(raw, "quantization_config")
    return ModelConfig(
        architecture=architecture,
        dtype=_dtype(raw),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=positive(raw, family.intermediate_size),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        context_length=context_length,
        rms_norm_eps=number(raw, "rms_norm_eps", family.usual_eps),
        rope_theta=rope_theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", family.usually_tied)),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        qk_norm=family.qk_norm,
        joined_projections=family.joined_projections,
        unrotated_layers=_unrotated_layers(raw, num_layers) if family.skips_rotation else frozenset(),
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
        if isinstance(architecture, str) and architecture in FAMILIES:
            # transformers goes by model_type, and would make another model of the same weights.
            model_type = raw.get("model_type")
            if model_type not in (None, FAMILIES[architecture].model_type):
                raise ModelError(
                    f"config.json names the architecture {architecture} and the model_type {model_type!r}, "
                    "which contradict each other"
                )
            return architecture
    what = f"the architecture {', '.join(map(str, named))}" if named else "a config.json that names no architecture"
    raise ModelError(f"{what} is not supported; supported are {', '.join(FAMILIES)}")


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"hidden_act {activation!r} is not supported; supported is 'silu'")
    if raw.get("mlp_bias"):
        raise ModelError("mlp_bias is not supported: the MLP's projections must have no biases")


def _routing(raw: dict[str, Any], family: Family) -> Routing | None:
    if not family.has_experts:
        return None
    if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
        raise ModelError("mlp_only_layers and decoder_sparse_step are not supported: every layer must have experts")
    # transformers writes either name for either model
    experts = positive(raw, "num_local_experts" if raw.get("num_experts") is None else "num_experts")
    per_token = positive(raw, "num_experts_per_tok")
    if per_token > experts:
        raise ModelError(f"num_experts_per_tok ({per_token}) is more than there are experts ({experts})")
    return Routing(
        experts, per_token, normalized=family.model_type == "mixtral" or bool(raw.get("norm_topk_prob", False))
    )


def _dtype(raw: dict[str, Any]) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ModelError(f"weights of dtype {dtype} are not supported; supported are {', '.join(DTYPES)}")
    return dtype


def _refuse_sliding_window(raw: dict[str, Any], family: Family, context_length: int) -> None:
    """Refuses windows that are shorter than the context; longer ones change nothing."""
    usual = family.usual_window
    window = None if raw.get("sliding_window", usual) is None else positive(raw, "sliding_window", usual)
    told = bool(raw.get("use_sliding_window", False))
    in_use = family.window is Window.IF_GIVEN or (family.window is Window.IF_TOLD and told)
    if in_use and window is not None and window < context_length:
        raise ModelError(
            f"sliding-window attention ({window} tokens) is not supported; "
            f"limit the context of {context_length} tokens to the window with --max-length {window}"
        )


def _unrotated_layers(raw: dict[str, Any], num_layers: int) -> frozenset[int]:
    """Of no_rope_layers, where 0 means that a layer has no rotation, or of every fourth layer."""
    rotated = raw.get("no_rope_layers")
    if rotated is None:
        interval = positive(raw, "no_rope_layer_interval", 4)
        return frozenset(range(interval - 1, num_layers, interval))
    if not isinstance(rotated, list) or len(rotated) != num_layers or any(layer not in (0, 1) for layer in rotated):
        raise ModelError(f"config.json must give no_rope_layers as a 0 or 1 for each of {num_layers} layers")
    return frozenset(index for index, layer in enumerate(rotated) if not layer)


def _eos_token_ids(raw: dict[str, Any], generation: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    ids: set[int] = set()
    for source in (raw, generation):
        named = source.get("eos_token_id")
        for token in named if isinstance(named, list) else [] if named is None else [named]:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise ModelError(f"eos_token_id {token!r} is not in the vocabulary of {vocab_size} tokens")
            ids.add(token)
    return tuple(sorted(ids))
