"""A model's weights: loaded from safetensors straight into fused tensors on the device, or made up."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from common.dtypes import torch_dtype
from common.model_config import DTYPES, ModelConfig, ModelError

_PROGRESS_AFTER_SECONDS = 1.0
_STORED_DTYPES = {torch_dtype(name) for name in DTYPES}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one layer, laid out as F.linear takes them: [out, in]. H hidden, D head_dim, I intermediate."""

    attention_norm: Tensor  # [H]
    qkv: Tensor  # [(Hq + 2 Hkv) * D, H]: q, k, v
    qkv_bias: Tensor | None  # [(Hq + 2 Hkv) * D]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    output: Tensor  # [H, Hq * D]
    output_bias: Tensor | None  # [H]
    mlp_norm: Tensor  # [H]
    gate_up: Tensor  # [2 I, H]: gate, up
    down: Tensor  # [H, I]


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [H]
    lm_head: Tensor  # [V, H]; the embedding itself where they are tied


def load(directory: Path, config: ModelConfig, dtype: str, device: torch.device) -> Weights:
    """Reads model.safetensors, or the shards that model.safetensors.index.json names, of a Hugging Face directory.

    Each tensor is copied into its place as it is read, so no more than one is held twice. Raises ModelError, naming the
    file and the tensor, where one is missing, unknown, of a wrong shape or dtype, or a file is damaged.
    """
    weights = _empty(config, dtype, device)
    places = _places(weights, config)
    missing = set(places)
    files = checkpoint_files(directory)
    size = sum(file.stat().st_size for file in files)
    with tqdm(
        total=size, desc="loading weights", unit="B", unit_scale=True, delay=_PROGRESS_AFTER_SECONDS, leave=False
    ) as progress:
        for file in files:
            try:
                with safe_open(file, framework="pt", device=str(device)) as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - not a mapping
                        if name not in places:
                            _refuse_unknown(name, file, config)
                            continue
                        stored = tensors.get_tensor(name)
                        _check(stored, places[name], name, file)
                        places[name].copy_(stored)
                        missing.discard(name)
                        progress.update(stored.nbytes)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} is not a readable safetensors file: {error}") from error
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(places)} tensors are missing in {directory}: {', '.join(sorted(missing)[:3])}"
            + (", …" if len(missing) > 3 else "")
        )
    return weights


def dummy(config: ModelConfig, dtype: str, device: torch.device, seed: int = 0) -> Weights:
    """Random weights for benchmarks: the same for the same seed on the same kind of device. Norms are 1 and biases 0;
    the rest is normal with variance 1 / inputs, which keeps activations in range in every dtype."""
    weights = _empty(config, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, place in _places(weights, config).items():
        if name.endswith("norm.weight"):
            place.fill_(1.0)
        elif name.endswith(".bias"):
            place.zero_()
        else:
            place.normal_(0.0, place.shape[1] ** -0.5, generator=generator)
    return weights


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files that hold a directory's weights, in order of their names. Raises ModelError for none."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is not a valid index of safetensors files") from error
        files = [directory / name for name in names]
    else:
        files = [directory / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} does not exist; weights must be safetensors")
    return files


def _empty(config: ModelConfig, dtype: str, device: torch.device) -> Weights:
    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch_dtype(dtype), device=device)

    hidden = config.hidden_size
    q_size = config.num_heads * config.head_dim
    qkv_size = q_size + 2 * config.num_kv_heads * config.head_dim
    embedding = make(config.vocab_size, hidden)
    return Weights(
        embedding=embedding,
        layers=tuple(
            LayerWeights(
                attention_norm=make(hidden),
                qkv=make(qkv_size, hidden),
                qkv_bias=make(qkv_size) if config.qkv_bias else None,
                q_norm=make(config.head_dim) if config.qk_norm else None,
                k_norm=make(config.head_dim) if config.qk_norm else None,
                output=make(hidden, q_size),
                output_bias=make(hidden) if config.output_bias else None,
                mlp_norm=make(hidden),
                gate_up=make(2 * config.intermediate_size, hidden),
                down=make(hidden, config.intermediate_size),
            )
            for _ in range(config.num_layers)
        ),
        norm=make(hidden),
        lm_head=embedding if config.tie_word_embeddings else make(config.vocab_size, hidden),
    )


def _places(weights: Weights, config: ModelConfig) -> dict[str, Tensor]:
    """Where each tensor of a Hugging Face checkpoint goes: views of the fused weights, by its name there."""
    places = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = weights.lm_head
    kv_size = config.num_kv_heads * config.head_dim
    qkv_sizes = [config.num_heads * config.head_dim, kv_size, kv_size]
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        attention = f"{prefix}.self_attn"
        q, k, v = layer.qkv.split(qkv_sizes)
        gate, up = layer.gate_up.chunk(2)
        places |= {
            f"{prefix}.input_layernorm.weight": layer.attention_norm,
            f"{attention}.q_proj.weight": q,
            f"{attention}.k_proj.weight": k,
            f"{attention}.v_proj.weight": v,
            f"{attention}.o_proj.weight": layer.output,
            f"{prefix}.post_attention_layernorm.weight": layer.mlp_norm,
            f"{prefix}.mlp.gate_proj.weight": gate,
            f"{prefix}.mlp.up_proj.weight": up,
            f"{prefix}.mlp.down_proj.weight": layer.down,
        }
        if layer.qkv_bias is not None:
            for part, bias in zip("qkv", layer.qkv_bias.split(qkv_sizes), strict=True):
                places[f"{attention}.{part}_proj.bias"] = bias
        if layer.output_bias is not None:
            places[f"{attention}.o_proj.bias"] = layer.output_bias
        if layer.q_norm is not None and layer.k_norm is not None:
            places[f"{attention}.q_norm.weight"] = layer.q_norm
            places[f"{attention}.k_norm.weight"] = layer.k_norm
    return places


def _refuse_unknown(name: str, file: Path, config: ModelConfig) -> None:
    """A tensor that the model has no use for means another model, except two that checkpoints carry for nothing."""
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
        return
    raise ModelError(f"{file} holds {name}, which {config.architecture} with this config.json does not have")


def _check(stored: Tensor, place: Tensor, name: str, file: Path) -> None:
    if stored.shape != place.shape:
        raise ModelError(
            f"{name} in {file} has shape {list(stored.shape)}, but config.json asks for {list(place.shape)}"
        )
    if stored.dtype not in _STORED_DTYPES:
        kind = str(stored.dtype).removeprefix("torch.")
        raise ModelError(f"{name} in {file} is {kind}, which is not supported; supported are {', '.join(DTYPES)}")
