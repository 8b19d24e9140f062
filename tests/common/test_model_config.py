"""Which configurations are taken, and in what words the others are refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, MixtralConfig, Phi3Config, Qwen3MoeConfig, SmolLM3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.model.model_config import Routing, load_config, parse_config
from common.model.model_error import ModelError
from common.model.rope_scaling import Llama3Scaling, YarnScaling

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "eos_token_id": 2,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def test_older_and_newer_spellings_are_read_alike() -> None:
    older = {"torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | SCALING}
    newer = {"dtype": "bfloat16", "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | SCALING}
    config = parse_config(LLAMA | older)
    assert config == parse_config(LLAMA | newer)
    assert (config.dtype, config.rope_theta) == ("bfloat16", 5e5)
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 1024)


@pytest.mark.parametrize("theta", [{}, {"rope_theta": 3e5}])
@pytest.mark.parametrize("added", [{"rope_type": "default"}, {"rope_type": "llama3", "rope_theta": 2e5, **SCALING}])
def test_rope_scaling_beside_rope_parameters_takes_their_place(added: dict[str, Any], theta: dict[str, Any]) -> None:
    written = {"rope_type": "llama3", "rope_theta": 1e5, **SCALING, "factor": 2.0}
    both = theta | {"rope_parameters": written, "rope_scaling": added}
    config = parse_config(LLAMA | both)
    theirs = LlamaConfig(**copy.deepcopy(both)).rope_parameters
    assert isinstance(theirs, dict)
    assert config.rope_theta == theirs["rope_theta"]
    assert (config.rope_scaling and config.rope_scaling.factor) == theirs.get("factor")


@pytest.mark.parametrize(
    ("said", "length"),
    [
        ({"factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"factor": 2.0, "original_max_position_embeddings": 512}, 2048),  # what config.json says is longer
        ({"factor": 16.0, "original_max_position_embeddings": 512}, 8192),
        ({"factor": 1.5}, 3072),
        ({"original_max_position_embeddings": 512}, 2048),
    ],
)
def test_yarn_makes_the_context_longer(said: dict[str, Any], length: int) -> None:
    config = parse_config(LLAMA | {"max_position_embeddings": 2048, "rope_scaling": {"type": "yarn"} | said})
    assert config.context_length == length
    assert parse_config(LLAMA | {"rope_scaling": {"type": "yarn"} | said}, max_length=600).context_length == 600


@pytest.mark.parametrize(
    "said", [{}, {"mscale": 0.7}, {"mscale": 0.7, "mscale_all_dim": 1.3}, {"attention_factor": 0.9}]
)
@pytest.mark.parametrize("factor", [1.0, 4.0, None])
def test_the_attention_factor_of_yarn_is_transformers(factor: float | None, said: dict[str, Any]) -> None:
    yarn = said | {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": 512}
    config = parse_config(LLAMA | {"rope_parameters": yarn})
    theirs = LlamaConfig(
        **{key: LLAMA[key] for key in ("hidden_size", "num_attention_heads", "max_position_embeddings")},
        rope_parameters=copy.deepcopy(yarn),
    )
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    assert isinstance(config.rope_scaling, YarnScaling)
    assert config.rope_scaling.attention_factor == pytest.approx(expected)


def test_what_is_not_said_has_its_architectures_default() -> None:
    config = parse_config({key: value for key, value in LLAMA.items() if key != "num_key_value_heads"})
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (4, 16, "float32")
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert not config.tie_word_embeddings


def test_features_follow_the_architecture() -> None:
    def features(architecture: str) -> tuple[bool, bool, bool]:
        config = parse_config(LLAMA | {"architectures": [architecture]})
        return config.qkv_bias, config.output_bias, config.qk_norm

    assert features("LlamaForCausalLM") == (False, False, False)
    assert features("MistralForCausalLM") == (False, False, False)
    assert features("Qwen2ForCausalLM") == (True, False, False)
    assert features("Qwen3ForCausalLM") == (False, False, True)


def test_what_a_family_does_not_say_is_what_transformers_takes() -> None:
    families = {"Phi3ForCausalLM": Phi3Config(pad_token_id=0), "SmolLM3ForCausalLM": SmolLM3Config()}
    for architecture, theirs in families.items():
        left_out = {"rms_norm_eps", "rope_theta", "tie_word_embeddings"}
        config = parse_config({key: LLAMA[key] for key in LLAMA.keys() - left_out} | {"architectures": [architecture]})
        assert isinstance(theirs.rope_parameters, dict)
        assert config.rope_theta == theirs.rope_parameters["rope_theta"]
        assert config.rms_norm_eps == theirs.rms_norm_eps
        assert config.tie_word_embeddings == theirs.tie_word_embeddings
        assert theirs.sliding_window is None


SMOLLM3 = LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 9}


@pytest.mark.parametrize(
    ("said", "unrotated"),
    [
        ({}, {3, 7}),
        ({"no_rope_layer_interval": 3}, {2, 5, 8}),
        ({"no_rope_layers": [1, 1, 0, 1, 1, 1, 1, 1, 0]}, {2, 8}),
        ({"no_rope_layers": [1] * 9}, set()),
    ],
)
def test_layers_that_rotate_nothing(said: dict[str, Any], unrotated: set[int]) -> None:
    assert parse_config(SMOLLM3 | said).unrotated_layers == unrotated
    theirs = SmolLM3Config(num_hidden_layers=9, **said).no_rope_layers
    assert {index for index, rotated in enumerate(theirs or ()) if not rotated} == unrotated
    assert not parse_config(LLAMA | said).unrotated_layers


@pytest.mark.parametrize("said", [[1] * 8, [1] * 8 + [2], "111111111", {"0": 1}, [None] * 9])
def test_what_is_no_list_of_rotated_layers_is_refused(said: Any) -> None:
    with pytest.raises(ModelError, match="no_rope_layers as a 0 or 1 for each of 9 layers"):
        parse_config(SMOLLM3 | {"no_rope_layers": said})


def test_a_phi3_has_its_window_whether_or_not_it_is_told_to_use_it() -> None:
    phi3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "sliding_window": 2047, "max_position_embeddings": 4096}
    with pytest.raises(ModelError, match="--max-length 2047"):
        parse_config(phi3)
    assert parse_config(phi3, max_length=2047).joined_projections


MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def test_mixtures_of_experts() -> None:
    mixtral, qwen = parse_config(MIXTRAL), parse_config(QWEN3_MOE)
    assert (mixtral.routing, mixtral.intermediate_size, mixtral.qk_norm) == (Routing(8, 2, True), 128, False)
    assert (qwen.routing, qwen.intermediate_size, qwen.qk_norm) == (Routing(16, 4, True), 24, True)
    as_written = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"} | {"num_local_experts": 16}
    assert parse_config(as_written | {"norm_topk_prob": False}).routing == Routing(16, 4, False)
    assert parse_config(LLAMA).routing is None


def test_what_a_mixtral_does_not_say_is_what_transformers_takes() -> None:
    config, theirs = (
        parse_config({key: value for key, value in MIXTRAL.items() if key != "rms_norm_eps"}),
        MixtralConfig(),
    )
    assert isinstance(theirs.rope_parameters, dict)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert theirs.sliding_window is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"decoder_sparse_step": 2}, "mlp_only_layers and decoder_sparse_step are not supported"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers and decoder_sparse_step are not supported"),
        ({"num_experts_per_tok": 17}, r"num_experts_per_tok \(17\) is more than there are experts \(16\)"),
        ({"num_experts": 0}, "must give num_experts as a positive whole number"),
        ({"num_experts": None}, "must give num_local_experts as a positive whole number"),
        ({"num_experts_per_tok": None}, "must give num_experts_per_tok"),
        ({"moe_intermediate_size": "wide"}, "must give moe_intermediate_size"),
    ],
)
def test_mixtures_that_are_refused(changed: dict[str, Any], words: str) -> None:
    assert parse_config(QWEN3_MOE | {"decoder_sparse_step": Qwen3MoeConfig().decoder_sparse_step})
    with pytest.raises(ModelError, match=words):
        parse_config(QWEN3_MOE | changed)


def test_a_model_type_of_another_architecture_is_refused() -> None:
    contradiction = r"names the architecture LlamaForCausalLM and the model_type 'qwen2', which contradict each other"
    with pytest.raises(ModelError, match=contradiction):
        parse_config(LLAMA | {"model_type": "qwen2"})
    assert parse_config(LLAMA | {"model_type": "llama"}) == parse_config(LLAMA)


def test_end_of_sequence_tokens_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert load_config(tmp_path).eos_token_ids == (2, 5, 7)


def test_max_length_lowers_the_context() -> None:
    assert parse_config(LLAMA, max_length=100).context_length == 100
    with pytest.raises(ModelError, match="5000 is outside the model's 1 to 4096"):
        parse_config(LLAMA, max_length=5000)


def test_a_sliding_window_is_refused_where_the_context_exceeds_it() -> None:
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 1024}
    with pytest.raises(ModelError, match=r"sliding-window attention \(1024 tokens\) .*--max-length 1024"):
        parse_config(mistral)
    assert parse_config(mistral, max_length=1024).context_length == 1024
    assert parse_config(mistral, to_run=False).context_length == 4096
    qwen2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 1024}
    assert parse_config(qwen2 | {"use_sliding_window": False}).context_length == 4096
    with pytest.raises(ModelError, match="sliding-window"):
        parse_config(qwen2 | {"use_sliding_window": True})


def test_a_window_that_config_json_does_not_mention_is_the_one_that_transformers_takes() -> None:
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}
    with pytest.raises(ModelError, match=rf"sliding-window attention \({MistralConfig().sliding_window} tokens\)"):
        parse_config(mistral)
    assert parse_config(mistral | {"sliding_window": None}).context_length == 8192
    qwen2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 8192}
    assert parse_config(qwen2).context_length == 8192
    with pytest.raises(ModelError, match=r"sliding-window attention \(4096 tokens\)"):
        parse_config(qwen2 | {"use_sliding_window": True})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported.*LlamaForCausalLM"),
        ({"architectures": None}, "names no architecture"),
        ({"dtype": "float64"}, "dtype float64 are not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not"),
        ({"rope_scaling": {"rope_type": "linear"}}, "must give factor as a positive number; it gives None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1e20}}, r"stretches \d+ tokens 1e\+20 times"),
        (
            {"rope_scaling": {"rope_type": "yarn", "beta_fast": 1}},
            "beta_fast above its beta_slow; it gives 1.0 and 1.0",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "truncate": 1}}, "truncate as true or false; it gives 1"),
        ({"rope_scaling": {"rope_type": "yarn"}, "rope_theta": 1}, "needs a rope_theta above 1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "'llama3' needs low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "weights quantized by 'awq' are not supported"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"hidden_size": None}, "hidden_size as a positive whole number"),
        ({"vocab_size": -1}, "vocab_size as a positive whole number; it gives -1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps as a positive number; it gives 0"),
        ({"rope_theta": 0.0}, "rope_theta as a positive number; it gives 0.0"),
        ({"rope_parameters": {"rope_theta": 0}, "rope_theta": 5e5}, "rope_theta as a positive number; it gives 0"),
    ],
)
def test_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        parse_config(LLAMA | change)


@pytest.mark.parametrize(
    ("content", "words"), [("{", "not valid JSON"), ("[]", "JSON object"), (None, "cannot read .*config.json")]
)
def test_damaged_files_are_refused(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=words):
        load_config(tmp_path)
