"""8-bit weights: which of config.json's descriptions are taken."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from common.model.model_error import ModelError
from common.model.quantization import Quantization, parse
from tests.common import hf_quantized
from tests.common.hf_quantized import FORMATS

FP8, CHANNELS, BLOCKS = FORMATS["fp8"], FORMATS["channels"], FORMATS["blocks"]


def test_published_descriptions() -> None:
    assert parse(FP8.config) == Quantization(in_blocks=True, scales="weight_scale_inv")
    assert parse(CHANNELS.config) == Quantization(in_blocks=False, scales="weight_scale")
    assert parse(BLOCKS.config) == Quantization(in_blocks=True, scales="weight_scale")


@pytest.mark.parametrize(
    ("form", "change"),
    [
        (FP8, {"fmt": None, "modules_to_not_convert": None}),
        (FP8, {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]}),
        (CHANNELS, {"ignore": ["re:.*lm_head", "re:.*mlp.gate$"], "version": "0.12.2", "transform_config": {}}),
        (CHANNELS, {"sparsity_config": {}}),
        (CHANNELS, {"sparsity_config": {"format": "dense", "sparsity_structure": "unstructured"}}),
        (CHANNELS, {"config_groups": {"fp8": CHANNELS.config["config_groups"]["group_0"] | {"format": "x"}}}),
    ],
)
def test_what_makes_no_difference(form: hf_quantized.Format, change: dict[str, Any]) -> None:
    assert parse(form.config | change) == parse(form.config)


def _set(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    """Sets, or for ... deletes, what is at the path in a quantization_config."""

    def edit(config: dict[str, Any]) -> None:
        *parents, last = path
        for key in parents:
            config = config[key]
        if value is ...:
            del config[last]
        else:
            config[last] = value

    return edit


def _in_group(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    return _set(value, "config_groups", "group_0", *path)


@pytest.mark.parametrize(
    ("form", "edit", "words"),
    [
        (FP8, _set("awq", "quant_method"), "weights quantized by 'awq' are not supported; supported are 8-bit floats"),
        (FP8, _set("gptq", "quant_method"), "weights quantized by 'gptq' are not supported"),
        (FP8, _set("bitsandbytes", "quant_method"), "weights quantized by 'bitsandbytes'"),
        (FP8, _set(..., "quant_method"), "weights quantized by None"),
        (FP8, _set(["fp8"], "quant_method"), r"weights quantized by \['fp8'\]"),
        (FP8, _set("static", "activation_scheme"), "gives activation_scheme as 'static', .* supported is 'dynamic'"),
        (FP8, _set(..., "weight_block_size"), r"gives weight_block_size as None, .* supported is \[128, 128\]"),
        (FP8, _set([64, 128], "weight_block_size"), r"gives weight_block_size as \[64, 128\]"),
        (FP8, _set({}, "weight_block_size"), "gives weight_block_size as {}"),
        (FP8, _set("e5m2", "fmt"), "gives fmt as 'e5m2', .* supported is 'e4m3' or None"),
        (CHANNELS, _set("pack-quantized", "format"), "gives format as 'pack-quantized', .*'float-quantized'"),
        (CHANNELS, _set("int-quantized", "format"), "gives format as 'int-quantized'"),
        (CHANNELS, _set({"num_bits": 8}, "kv_cache_scheme"), "gives kv_cache_scheme as {'num_bits': 8}, .* is None"),
        (CHANNELS, _set({"config_groups": 1}, "transform_config"), "gives transform_config as {'config_groups': 1}"),
        (
            CHANNELS,
            _set({"format": "sparse-24-bitmask"}, "sparsity_config"),
            "gives sparsity_config.format as 'sparse-24-bitmask', .* supported is 'dense' or None",
        ),
        (CHANNELS, _set([1], "sparsity_config"), r"must give sparsity_config as an object; it gives \[1\]"),
        (CHANNELS, _set(..., "config_groups"), "must give config_groups as an object; it gives None"),
        (CHANNELS, _set([], "config_groups"), r"must give config_groups as an object; it gives \[\]"),
        (CHANNELS, _set({}, "config_groups"), "has 0 config_groups; supported is one"),
        (CHANNELS, _set({}, "config_groups", "group_1"), "has 2 config_groups; supported is one, for all projections"),
        (CHANNELS, _set(None, "config_groups", "group_0"), "must give group_0 as an object; it gives None"),
        (CHANNELS, _in_group(None, "weights"), "must give weights as an object; it gives None"),
        (CHANNELS, _in_group([8], "weights"), r"must give weights as an object; it gives \[8\]"),
        (CHANNELS, _in_group(..., "input_activations"), "must give input_activations as an object; it gives None"),
        (CHANNELS, _in_group({"num_bits": 8}, "output_activations"), "gives output_activations as {'num_bits': 8}"),
        (CHANNELS, _in_group("tensor", "weights", "strategy"), "weights.strategy as 'tensor', .*'channel' or 'block'"),
        (CHANNELS, _in_group(["channel"], "weights", "strategy"), r"weights.strategy as \['channel'\]"),
        (CHANNELS, _in_group(4, "weights", "num_bits"), "weights.num_bits as 4, .* supported is 8"),
        (CHANNELS, _in_group("int", "weights", "type"), "weights.type as 'int', .* supported is 'float'"),
        (CHANNELS, _in_group(False, "weights", "symmetric"), "weights.symmetric as False"),
        (CHANNELS, _in_group(True, "weights", "dynamic"), "weights.dynamic as True"),
        (CHANNELS, _in_group(False, "input_activations", "dynamic"), "input_activations.dynamic as False, .* is True"),
        (CHANNELS, _in_group("int", "input_activations", "type"), "input_activations.type as 'int'"),
        (CHANNELS, _in_group("tensor", "input_activations", "strategy"), "input_activations.strategy as 'tensor'"),
        (CHANNELS, _in_group("group", "input_activations", "strategy"), "input_activations.strategy as 'group'"),
        (BLOCKS, _in_group([128, 64], "weights", "block_structure"), r"weights.block_structure as \[128, 64\]"),
        (BLOCKS, _in_group("token", "input_activations", "strategy"), "input_activations.strategy as 'token', .*group"),
        (BLOCKS, _in_group(64, "input_activations", "group_size"), "input_activations.group_size as 64, .* is 128"),
    ],
)
def test_descriptions_that_are_refused(
    form: hf_quantized.Format, edit: Callable[[dict[str, Any]], None], words: str
) -> None:
    config = copy.deepcopy(form.config)
    edit(config)
    with pytest.raises(ModelError, match=words):
        parse(config)
