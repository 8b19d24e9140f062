"""Whatever a model's files hold, the model loads, or there is a ModelError with a sentence, and soon: nothing else is
raised, and no count in a file is believed."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from common.kv.kv_pool import KvLayout
from common.model import fingerprint, gguf_import, weights
from common.model.model_config import load_config, parse_config
from common.model.model_error import ModelError
from common.model.rotary import rotary_table
from common.model.safetensors_files import DTYPES
from tests.common.hf_quantized import FORMATS
from tests.damage import JSON, altered, damaged
from tests.messages import fuzz

ROOT = Path(__file__).parents[2]

EXAMPLES = [60, pytest.param(3_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]

HIDDEN, VOCAB, INTERMEDIATE = 8, 12, 16
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "eos_token_id": [2],
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "quantization_config": None,
    "rope_theta": 1e4,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 1,
    },
}
SHAPES = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "model.layers.0.input_layernorm.weight": (HIDDEN,),
    "model.layers.0.self_attn.q_proj.weight": (8, HIDDEN),
    "model.layers.0.self_attn.k_proj.weight": (4, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (4, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, 8),
    "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "model.layers.0.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
}
LAYOUT = KvLayout(num_blocks=4, num_layers=1, block_size=16, num_kv_heads=1, head_dim=4, dtype="float32")
CPU = torch.device("cpu")


def refused_with_a_sentence(work: Callable[[], object]) -> bool:
    try:
        work()
    except ModelError as error:
        sentence = str(error)
    else:
        return False
    assert len(sentence.split()) > 3
    return True


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_any_configuration(architecture: str, examples: int) -> None:
    valid = CONFIG | {"architectures": [architecture]}
    assert not refused_with_a_sentence(lambda: parse_config(valid))

    @fuzz(2 * examples)
    @given(altered(valid), altered({"eos_token_id": [1, 2]}))
    def any_configuration(raw: Any, generation: Any) -> None:
        if isinstance(raw, dict) and isinstance(generation, dict):
            refused_with_a_sentence(lambda: parse_config(raw, generation))

    any_configuration()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_stretch_of_the_rotation(examples: int) -> None:
    valid = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
        "attention_factor": None,
    }
    assert not refused_with_a_sentence(lambda: parse_config(CONFIG | {"rope_scaling": valid}))

    def table(raw: Any) -> None:
        config = parse_config(CONFIG | {"rope_scaling": raw}, max_length=16)
        assert rotary_table(config).isfinite().all()

    @fuzz(2 * examples)
    @given(altered(valid))
    def any_stretch(raw: Any) -> None:
        refused_with_a_sentence(lambda: table(raw))

    any_stretch()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("form", list(FORMATS))
def test_any_description_of_8_bit_weights(form: str, examples: int) -> None:
    valid = FORMATS[form].config
    assert not refused_with_a_sentence(lambda: parse_config(CONFIG | {"quantization_config": valid}))

    @fuzz(2 * examples)
    @given(altered(valid))
    def any_description(raw: Any) -> None:
        refused_with_a_sentence(lambda: parse_config(CONFIG | {"quantization_config": raw}))

    any_description()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_any_bytes_of_a_configuration(tmp_path: Path, name: str) -> None:
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_text(json.dumps(CONFIG))
    whole = (tmp_path / name).read_bytes()
    assert not refused_with_a_sentence(lambda: load_config(tmp_path))

    @fuzz(40)
    @given(
        damaged(whole)
        | st.sampled_from([b"[" * 100_000, b"\xff\xfe", b"null", b'{"vocab_size":' + b"9" * 5_000 + b"}"])
    )
    def any_bytes(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        refused_with_a_sentence(lambda: load_config(tmp_path))

    any_bytes()


def test_sizes_that_no_machine_has_room_for() -> None:
    config = parse_config(CONFIG | {"hidden_size": 1 << 25, "vocab_size": 1 << 25})
    with pytest.raises(ModelError, match="there is no room for model"):
        weights.dummy(config, "float32", CPU)


# ---------------------------------------------------------------- safetensors


def write_safetensors(directory: Path, *, quantized: bool = False) -> Path:
    tensors = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    if quantized:
        for name in [name for name in tensors if "_proj" in name]:
            tensors[f"{name}_scale"] = torch.ones(len(tensors[name]), 1, dtype=torch.bfloat16)
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    described = {"quantization_config": FORMATS["channels"].config if quantized else None}
    (directory / "config.json").write_text(json.dumps(CONFIG | described))
    file = directory / "model.safetensors"
    file.write_bytes(save(tensors))
    return file


def load(directory: Path) -> None:
    weights.load(directory, load_config(directory), "float32", CPU)
    fingerprint.compute(directory, "auto", "float32", LAYOUT)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_bytes_of_a_checkpoint(tmp_path: Path, examples: int) -> None:
    file = write_safetensors(tmp_path)
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    assert not refused_with_a_sentence(lambda: load(tmp_path))

    @fuzz(examples)
    @given(damaged(whole[:end]).map(lambda header: header + whole[end:]) | damaged(whole))
    def any_bytes(content: bytes) -> None:
        file.unlink()  # what is mapped of the one before stays as it is
        file.write_bytes(content)
        refused_with_a_sentence(lambda: load(tmp_path))

    any_bytes()


TYPES = st.sampled_from([*DTYPES, "F8_E5M2", "F8_E8M0", "U8"])


def _with_dtype(header: dict[str, Any], name: str, dtype: str) -> dict[str, Any]:
    return header | {name: header[name] | {"dtype": dtype}}


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("quantized", [False, True])
def test_any_header_of_a_checkpoint(tmp_path: Path, quantized: bool, examples: int) -> None:
    file = write_safetensors(tmp_path, quantized=quantized)
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    assert not refused_with_a_sentence(lambda: load(tmp_path))

    @fuzz(examples)
    @given(altered(header) | st.builds(_with_dtype, st.just(header), st.sampled_from(sorted(header)), TYPES))
    def any_header(changed: Any) -> None:
        text = json.dumps(changed).encode()
        file.unlink()
        file.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])
        refused_with_a_sentence(lambda: load(tmp_path))

    any_header()


def test_any_index_of_shards(tmp_path: Path) -> None:
    write_safetensors(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "shard.safetensors")
    index = {"weight_map": dict.fromkeys(SHAPES, "shard.safetensors")}

    @fuzz(60)
    @given(altered(index) | st.builds(lambda value: {"weight_map": {"a": value}}, JSON))
    def any_index(changed: Any) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(changed))
        refused_with_a_sentence(lambda: load(tmp_path))

    any_index()
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    assert refused_with_a_sentence(lambda: load(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../shard.safetensors"}}))
    with pytest.raises(ModelError, match="outside its directory"):
        load(tmp_path)


# ---------------------------------------------------------------- GGUF


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(4)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|a|>", "<|b|>", *"abcdefgh", "ab", "cd"])
    writer.add_token_types([3, 3] + [1] * 10)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template("{{ messages }}")
    names = {f"model.layers.0.{theirs}": f"blk.0.{ours}" for ours, theirs in gguf_import._LAYER_TENSORS.items()}
    names |= {theirs: ours for ours, theirs in gguf_import._TENSORS.items()}
    for name, shape in SHAPES.items():
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_bytes_of_a_gguf(tmp_path: Path, examples: int) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(source)
    gguf_import.convert(source, tmp_path)
    load(tmp_path)
    whole = source.read_bytes()
    described = whole.index(b"output_norm.weight") + 60  # what comes before the tensors' data

    @fuzz(2 * examples)
    @given(damaged(whole) | damaged(whole[:described]).map(lambda front: front + whole[described:]))
    def any_bytes(content: bytes) -> None:
        source.unlink()
        source.write_bytes(content)
        refused_with_a_sentence(lambda: gguf_import.convert(source, tmp_path))

    any_bytes()


def test_progress_is_shown_to_terminals_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights, "_PROGRESS_AFTER_SECONDS", 0)
    source = tmp_path / "model.gguf"
    write_gguf(source)
    gguf_import.convert(source, tmp_path)
    load(tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_full_disk_is_no_damage(tmp_path: Path, file: str) -> None:
    source, target = tmp_path / "model.gguf", tmp_path / "target"
    write_gguf(source)
    target.mkdir()
    (target / file).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as refused:
        gguf_import.convert(source, target)
    assert refused.value.errno == errno.ENOSPC


# In a process of its own, as the limit is one of everything that a process writes.
WITH_A_FILE_LIMIT = """
import resource, sys
from pathlib import Path
from common.model import gguf_import
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    gguf_import.convert(Path(sys.argv[1]), Path(sys.argv[2]))
except OSError as error:
    print(error.strerror)
"""


def test_a_disk_that_fills_up_while_weights_are_written_is_no_damage(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(source)
    gguf_import.convert(source, tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    command: list[str | Path] = [sys.executable, "-c", WITH_A_FILE_LIMIT, source, tmp_path, str(size - 1)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "File too large\n"
