"""Small random models as checkpoints of 8-bit floats, and as transformers computes them: with the weights that those
stand for, and with the input of every projection rounded to 8-bit floats. Shares no code with what it tests."""

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.common import hf_models

_SIZES: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "dtype": "float32",
}

# Made of whole blocks, q of more of them than k and v.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, head_dim=64, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SIZES | {"num_attention_heads": 3, "num_key_value_heads": 1}, head_dim=128),
    "qwen3-moe": Qwen3MoeConfig(
        **_SIZES | {"head_dim": 64},
        moe_intermediate_size=128,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=True,
    ),
    "mixtral": MixtralConfig(**_SIZES, head_dim=64, num_local_experts=4, num_experts_per_tok=2),
}

_EIGHT_BITS: dict[str, Any] = {
    "actorder": None,
    "block_structure": None,
    "group_size": None,
    "num_bits": 8,
    "observer_kwargs": {},
    "symmetric": True,
    "type": "float",
}


def _compressed(weights: dict[str, Any], activations: dict[str, Any]) -> dict[str, Any]:
    group = {
        "input_activations": _EIGHT_BITS | {"dynamic": True, "observer": None} | activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _EIGHT_BITS | {"dynamic": False, "observer": "minmax"} | weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "global_compression_ratio": 1.463,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


@dataclass(frozen=True, slots=True)
class Format:
    """How 8-bit floats are published."""

    config: dict[str, Any]  # the quantization_config
    scales: str  # what they are called
    ignored: str  # in which entry of the config are the layers that are no 8-bit floats
    in_blocks: bool


FORMATS = {
    # as of Qwen/Qwen3-8B-FP8
    "fp8": Format(
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        scales="weight_scale_inv",
        ignored="modules_to_not_convert",
        in_blocks=True,
    ),
    # as of RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic
    "channels": Format(
        _compressed({"strategy": "channel"}, {"strategy": "token"}),
        scales="weight_scale",
        ignored="ignore",
        in_blocks=False,
    ),
    # as llm-compressor's FP8_BLOCK
    "blocks": Format(
        _compressed({"strategy": "block", "block_structure": [128, 128]}, {"strategy": "group", "group_size": 128}),
        scales="weight_scale",
        ignored="ignore",
        in_blocks=True,
    ),
}

_PROJECTION = re.compile(r"\.([qkvo]_proj|(gate|up|down)_proj|w[123]|gate_up_proj)(\.weight)?$")  # but not "mlp.gate"


@dataclass(frozen=True, slots=True)
class Reference:
    """transformers' model, whose projections multiply 8-bit floats."""

    model: PreTrainedModel
    in_blocks: bool

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """[T, V], after each of the tokens."""
        with _RoundedInputs(self.model, self.in_blocks):
            logits: Tensor = self.model(torch.tensor([tokens])).logits
        return logits[0]


class _RoundedInputs(TorchFunctionMode):
    """Rounds what projections are given. Not by hooks, as transformers' experts are no modules."""

    def __init__(self, model: PreTrainedModel, in_blocks: bool) -> None:
        super().__init__()
        named = model.named_parameters()
        self._weights = {weight.untyped_storage().data_ptr() for name, weight in named if _PROJECTION.search(name)}
        self._in_blocks = in_blocks

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and args[1].untyped_storage().data_ptr() in self._weights:
            args = (_rounded(args[0], 128 if self._in_blocks else args[0].shape[-1]), *args[1:])
        return func(*args, **(kwargs or {}))


def _rounded(x: Tensor, group: int) -> Tensor:
    groups = x.float().reshape(*x.shape[:-1], -1, group)
    scales = groups.abs().amax(-1, keepdim=True) / 448
    return ((groups / scales).to(torch.float8_e4m3fn).float() * scales).reshape(x.shape).to(x.dtype)


def save(
    config: PreTrainedConfig,
    form: Format,
    directory: Path,
    max_shard_size: str = "5GB",
    scale_dtype: torch.dtype = torch.float32,
) -> Reference:
    """Writes a random model to `directory`, its projections in 8-bit floats whose scales differ much."""
    plain = hf_models.random_model(config, seed=1)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if _PROJECTION.search(name) and weight.dim() > 1:
                weight.mul_(_uneven(weight.shape[-2], 1)).mul_(_uneven(1, weight.shape[-1]))
    plain.save_pretrained(directory, max_shard_size=max_shard_size)
    ignored = ["lm_head"]
    with tempfile.TemporaryDirectory() as folder:
        for file in directory.glob("*.safetensors"):
            written, meant = _quantized(load_file(file), form, scale_dtype)
            file.unlink()  # not over it: it is mapped
            save_file(written, file, {"format": "pt"})
            save_file(meant, Path(folder) / file.name, {"format": "pt"})
            ignored += [name.removesuffix(".weight") for name in meant if name.endswith(".gate.weight")]
        for file in directory.glob("*.json"):
            (Path(folder) / file.name).write_bytes(file.read_bytes())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    change_config(directory, quantization_config=form.config | {form.ignored: ignored})
    _add_scales_to_index(directory, form)
    return Reference(model, form.in_blocks)


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _uneven(rows: int, columns: int) -> Tensor:
    """Factors of 1/2 to 2, one for each 64 rows or columns, and a little for each of them."""
    wide = torch.rand(-(-rows // 64), -(-columns // 64)).repeat_interleave(64, 0).repeat_interleave(64, 1)
    return 2 ** (2 * wide[:rows, :columns] - 1 + 0.1 * torch.randn(rows, columns))


def _quantized(
    tensors: dict[str, Tensor], form: Format, scale_dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is stored in place of `tensors`, and what it stands for."""
    written, meant = {}, {}
    for name, tensor in tensors.items():
        written[name] = meant[name] = tensor.clone()
        if _PROJECTION.search(name):
            rows, columns = tensor.shape
            height, width = (128, 128) if form.in_blocks else (1, columns)
            blocks = tensor.view(rows // height, height, columns // width, width)
            scales = (blocks.abs().amax((1, 3), keepdim=True) / 440).to(scale_dtype).float()
            values = (blocks / scales).to(torch.float8_e4m3fn)
            written[name] = values.view(rows, columns)
            written[f"{name.removesuffix('weight')}{form.scales}"] = scales[:, 0, :, 0].to(scale_dtype)
            meant[name] = (values.float() * scales).view(rows, columns)
    return written, meant


def _add_scales_to_index(directory: Path, form: Format) -> None:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        places = content["weight_map"].items()
        scales = {re.sub("weight$", form.scales, name): file for name, file in places if _PROJECTION.search(name)}
        index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | scales}))
