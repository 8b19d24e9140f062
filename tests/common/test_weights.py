"""Reading checkpoints: one file or shards, mapped or converted, whole or damaged."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.device import cpu_memory
from common.kv.kv_pool import KvLayout
from common.model import fingerprint, weights
from common.model.model_config import load_config
from common.model.model_error import ModelError
from tests.common import hf_models

CPU = torch.device("cpu")
LAYOUT = KvLayout(num_blocks=10, num_layers=3, block_size=16, num_kv_heads=1, head_dim=64, dtype="float32")


def _load(directory: Path, dtype: str = "float32") -> weights.Weights:
    return weights.load(directory, load_config(directory), dtype, CPU)


def _flat(loaded: weights.Weights) -> dict[str, Tensor]:
    named = {"embedding": loaded.embedding, "norm": loaded.norm, "lm_head": loaded.lm_head}
    for index, layer in enumerate(loaded.layers):
        values = {field.name: getattr(part, field.name) for part in (layer, layer.mlp) for field in fields(part)}
        named |= {f"{index}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
    # a packed one has no elements to compare
    return {name: tensor.to_dense() if tensor.is_mkldnn else tensor for name, tensor in named.items()}


@pytest.mark.parametrize(("name", "shard"), [("qwen2", "1MB"), ("qwen3-moe", "200KB")])
def test_shards_hold_the_same_as_one_file(name: str, shard: str, tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    hf_models.save(name, one)
    hf_models.save(name, many, max_shard_size=shard)
    assert len(list(many.glob("*.safetensors"))) > 2
    expected, loaded = _flat(_load(one)), _flat(_load(many))
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in expected.items())


def test_a_model_saved_over_a_sharded_one_is_the_one_that_is_read(tmp_path: Path) -> None:
    over, alone = tmp_path / "over", tmp_path / "alone"
    hf_models.save("qwen2", over, max_shard_size="1MB")
    shards = {shard: shard.read_bytes() for shard in over.glob("*.safetensors")}
    for directory in (over, alone):
        hf_models.save("qwen3", directory)
    assert (over / "model.safetensors.index.json").exists()  # as transformers leaves it
    for shard, content in shards.items():
        shard.write_bytes(content)
    expected, loaded = _flat(_load(alone)), _flat(_load(over))
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)


def test_another_dtype_is_converted(tmp_path: Path) -> None:
    hf_models.save("llama", tmp_path)
    exact, rounded = _flat(_load(tmp_path)), _flat(_load(tmp_path, "bfloat16"))
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def test_of_the_embedded_model_what_is_not_packed_is_mapped_and_not_copied(embedded: Path) -> None:
    loaded = _load(embedded)
    norms = [loaded.norm, *(norm for layer in loaded.layers for norm in (layer.attention_norm, layer.mlp_norm))]
    assert {norm.untyped_storage().data_ptr() for norm in norms} == {loaded.embedding.untyped_storage().data_ptr()}


def test_with_little_memory_all_of_the_embedded_model_is_mapped(
    embedded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_memory, "available_bytes", lambda: 1 << 30)
    loaded = _load(embedded)
    assert loaded.lm_head is loaded.embedding
    assert len({tensor.untyped_storage().data_ptr() for tensor in _flat(loaded).values()}) == 1
    assert all(_flat(loaded)[f"{index}.qkv"].data_ptr() % 64 == 0 for index in range(len(loaded.layers)))


@pytest.mark.parametrize(("free", "keeps"), [(1 << 30, True), (1 << 12, False)])
def test_matrices_that_were_converted_are_kept_beside_their_packed_copies_only_if_there_is_room(
    free: int, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_models.save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    before = _load(tmp_path).lm_head
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(cpu_memory, "available_bytes", lambda: free)
    after = _load(tmp_path).lm_head
    assert after.is_mkldnn == before.is_mkldnn, "nothing of it is mapped, so packing takes no more memory"
    if after.is_mkldnn:
        assert hasattr(after, "plain") == keeps


def test_dummy_weights_are_reproducible_and_tame(tmp_path: Path) -> None:
    hf_models.save("qwen3", tmp_path)
    config = load_config(tmp_path)
    first, again, other = (_flat(weights.dummy(config, "float32", CPU, seed)) for seed in (1, 1, 2))
    assert first.keys() == _flat(_load(tmp_path)).keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.qkv"], other["0.qkv"])
    assert first["0.q_norm"].eq(1).all()
    assert (first["0.down"].std() * first["0.down"].shape[1] ** 0.5).item() == pytest.approx(1, rel=0.05)


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _with(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_without("model.layers.1.mlp.up_proj.weight"), r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        (_with("model.norm.weight", torch.ones(71)), r"model\.norm\.weight .* has shape \[71\].*asks for \[72\]"),
        (_with("model.norm.weight", torch.ones(72, dtype=torch.float64)), "model.norm.weight .* is F64.*not supported"),
        (_with("model.layers.0.self_attn.q_proj.bias", torch.ones(192)), "q_proj.bias, which LlamaForCausalLM"),
        (_with("model.layers.3.input_layernorm.weight", torch.ones(72)), r"holds model\.layers\.3"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    edit: Callable[[dict[str, Tensor]], None], words: str, tmp_path: Path
) -> None:
    hf_models.save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=words):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.4.w3.weight"),
        ("qwen3-moe", "model.layers.2.mlp.experts.10.down_proj.weight"),
        ("qwen3-moe", "model.layers.0.mlp.gate.weight"),
    ],
)
def test_a_missing_part_of_a_mixture_is_named(name: str, missing: str, tmp_path: Path) -> None:
    hf_models.save(name, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items() if name != missing}
    save_file(tensors, file)
    with pytest.raises(ModelError, match=f"lacks the tensor {missing}"):
        _load(tmp_path)


def test_experts_are_stacked(tmp_path: Path) -> None:
    hf_models.save("qwen3-moe", tmp_path)
    loaded = _flat(_load(tmp_path))
    assert loaded["0.router"].shape == (11, 88)
    assert loaded["0.gate_up"].shape == (11, 80, 88)


def test_tensors_that_checkpoints_carry_for_nothing_are_passed_over(tmp_path: Path) -> None:
    hf_models.save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    save_file(tensors, file)
    loaded = _load(tmp_path)
    assert torch.equal(loaded.lm_head.to_dense(), loaded.embedding)


def test_of_a_tied_embedding_and_head_either_may_be_stored(tmp_path: Path) -> None:
    hf_models.save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = embedding = tensors.pop("model.embed_tokens.weight").clone()
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).model.embed_tokens.weight, embedding)
    loaded = _load(tmp_path)
    assert torch.equal(loaded.embedding, embedding)
    assert torch.equal(loaded.lm_head.to_dense(), embedding)


def test_an_output_head_of_its_own_is_not_tied_whatever_config_json_says(tmp_path: Path) -> None:
    """As a model that was trained on with the two apart is often saved."""
    hf_models.save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, file, {"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = _load(tmp_path)
    assert torch.equal(loaded.lm_head.to_dense(), theirs.lm_head.weight)
    assert torch.equal(loaded.embedding, theirs.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-100],
        lambda content: content[:6],
        lambda content: b"",
        lambda content: content[:20] + b"\0" + content[21:],
        lambda content: b"\xff" * 8 + content[8:],
    ],
    ids=["cut", "no header", "empty", "broken header", "huge header"],
)
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    hf_models.save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(damage(content))
    with pytest.raises(ModelError, match=r"model\.safetensors is not a readable safetensors file"):
        _load(tmp_path)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    hf_models.save("qwen2", tmp_path, max_shard_size="1MB")
    shard = min(tmp_path.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} does not exist"):
        _load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="not a valid index"):
        _load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors does not exist"):
        _load(tmp_path)


def test_fingerprints_differ_with_weights_configuration_dtype_and_block(tmp_path: Path) -> None:
    hf_models.save("llama", tmp_path)

    def now(dtype: str = "float32", layout: KvLayout = LAYOUT, load_format: str = "auto") -> str:
        return fingerprint.compute(tmp_path, load_format, dtype, layout)

    before = now()
    assert len(bytes.fromhex(before)) == 16
    assert now() == before
    assert now(layout=KvLayout(99, 3, 16, 1, 64, "float32")) == before
    variants = {now("bfloat16"), now(layout=KvLayout(10, 3, 8, 1, 64, "float32")), now(load_format="dummy")}

    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, file)
    variants.add(now())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    variants.add(now())
    assert len(variants | {before}) == 6
