"""How a model's weights were quantized, as its config.json says. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.model.model_error import ModelError

BLOCK = 128  # rows and columns that share a scale


@dataclass(frozen=True, slots=True)
class Quantization:
    """Projections of the layers are stored as 8-bit floats (e4m3) with scales; all else is as in other models."""

    in_blocks: bool  # one scale for each BLOCK x BLOCK block; else one for each output
    scales: str  # what a projection's scales are called beside its "weight"

    def scales_shape(self, name: str, rows: int, columns: int) -> tuple[int, int]:
        """Of the matrix called `name`. Raises ModelError if it is not made of whole blocks."""
        if not self.in_blocks:
            return rows, 1
        if rows % BLOCK or columns % BLOCK:
            raise ModelError(f"{name} of {rows} x {columns} is not made of whole blocks of {BLOCK} x {BLOCK}")
        return rows // BLOCK, columns // BLOCK


def parse(raw: Mapping[str, Any]) -> Quantization:
    """What a config.json's quantization_config says. Raises ModelError, which names what is not supported in it."""
    match method := raw.get("quant_method"):
        case "fp8":
            return _fine_grained(raw)
        case "compressed-tensors":
            return _compressed(raw)
    raise ModelError(
        f"weights quantized by {method!r} are not supported; supported are 8-bit floats, by 'fp8' and "
        "'compressed-tensors', and float32, bfloat16 and float16 models"
    )


def _fine_grained(raw: Mapping[str, Any]) -> Quantization:
    """As Qwen and DeepSeek publish them."""
    _require(raw, fmt=("e4m3", None), activation_scheme=("dynamic",), weight_block_size=([BLOCK, BLOCK],))
    return Quantization(in_blocks=True, scales="weight_scale_inv")


def _compressed(raw: Mapping[str, Any]) -> Quantization:
    """As vLLM's llm-compressor writes them."""
    _require(raw, format=("float-quantized",), kv_cache_scheme=(None,), transform_config=(None, {}))
    if raw.get("sparsity_config"):
        _require(_object(raw, "sparsity_config"), "sparsity_config.", format=("dense", None))
    groups = _object(raw, "config_groups")
    if len(groups) != 1:
        raise ModelError(
            f"quantization_config has {len(groups)} config_groups; supported is one, for all projections of the layers"
        )
    (name,) = groups
    group = _object(groups, name)
    weights, activations = (_object(group, part) for part in ("weights", "input_activations"))
    eight_bits: dict[str, tuple[Any, ...]] = {"num_bits": (8,), "type": ("float",), "symmetric": (True,)}
    _require(weights, "weights.", **eight_bits, strategy=("channel", "block"), dynamic=(False, None))
    _require(activations, "input_activations.", **eight_bits, dynamic=(True,))
    if in_blocks := weights["strategy"] == "block":
        _require(weights, "weights.", block_structure=([BLOCK, BLOCK],))
        _require(activations, "input_activations.", strategy=("group",), group_size=(BLOCK,))
    else:
        _require(activations, "input_activations.", strategy=("token",))
    _require(group, output_activations=(None,))
    return Quantization(in_blocks=in_blocks, scales="weight_scale")


def _object(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    if not isinstance(value, dict):
        raise ModelError(f"quantization_config must give {key} as an object; it gives {value!r}")
    return value


def _require(raw: Mapping[str, Any], within: str = "", **supported: tuple[Any, ...]) -> None:
    for key, values in supported.items():
        if raw.get(key) not in values:
            raise ModelError(
                f"quantization_config gives {within}{key} as {raw.get(key)!r}, which is not supported; supported is "
                + " or ".join(map(repr, values))
            )
