"""8-bit weights: how checkpoints are read, and what the model computes, against transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from common.kv.kv_pool import KvLayout
from common.model import fingerprint, weights
from common.model.model_config import load_config
from common.model.model_error import ModelError
from kernels import fp8
from kernels.experts import Experts
from kernels.fp8 import E4M3, Fp8Weight
from kernels.ops import REFERENCE
from tests.common import hf_models, hf_quantized
from tests.common.hf_quantized import CONFIGS, FORMATS, Reference
from tests.paged import PagedSequences

CPU = torch.device("cpu")
LENGTHS = (1, 2, 5, 9, 17, 23, 31, 45)
FP8, CHANNELS, BLOCKS = FORMATS["fp8"], FORMATS["channels"], FORMATS["blocks"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# ---------------------------------------------------------------- what the model computes


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 500, (length,), generator=generator).tolist() for length in LENGTHS]


def _ours(directory: Path, dtype: str = "float32", room: int = 8, block_size: int = 4) -> PagedSequences:
    return PagedSequences(hf_models.load_ours(directory, dtype), REFERENCE, _prompts(), room, block_size)


def _differences(ours: list[Tensor], reference: Reference, forced: Tensor) -> Tensor:
    """Largest difference of each row of logits, in standard deviations of theirs: [steps, prompts]."""
    differences = []
    for row, prompt in enumerate(_prompts()):
        theirs = reference.logits(prompt + forced[row].tolist())[len(prompt) - 1 :]
        difference = torch.stack([step[row] for step in ours]) - theirs
        differences.append(difference.abs().amax(-1) / theirs.std(-1))
    return torch.stack(differences, dim=1)


@pytest.mark.parametrize(
    ("form", "config"),
    [
        *((FP8, config) for config in CONFIGS.values()),
        *((CHANNELS, config) for config in CONFIGS.values()),
        *((CHANNELS, hf_models.CONFIGS[name]) for name in ("llama-biases", "qwen3-moe")),  # not made of whole blocks
        *((BLOCKS, CONFIGS[name]) for name in ("llama", "qwen3-moe")),
    ],
    ids=lambda value: next((name for name, form in FORMATS.items() if form == value), type(value).__name__),
)
def test_logits_equal_transformers(form: hf_quantized.Format, config: PreTrainedConfig, tmp_path: Path) -> None:
    """But where a value lies so close to the middle of two 8-bit floats that one rounds it up and the other down: two
    rows in a hundred then differ by up to a tenth of their spread, or by more where another expert is chosen, and which
    they are depends on the processor. Inputs that are not rounded at all change every row by a fifth of it and more.
    Tolerance: after each step five rows of eight within 1e-4 of their spread, and of all nine in ten within a half."""
    reference = hf_quantized.save(config, form, tmp_path)
    ours = _ours(tmp_path)
    forced = torch.randint(3, 500, (len(LENGTHS), 3), generator=torch.Generator().manual_seed(2))
    logits = [ours.prefill(chunk=7), *(ours.step(tokens) for tokens in forced.T)]
    differences = _differences(logits, reference, forced)
    assert (differences < 1e-4).sum(1).min() >= 5, differences
    assert (differences < 0.5).float().mean() >= 0.9, differences


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize(("name", "form"), [("qwen2", "channels"), ("qwen3", "fp8"), ("mixtral", "fp8")])
def test_greedy_tokens_are_those_of_transformers(name: str, form: str, chunk: int | None, tmp_path: Path) -> None:
    """Each is the one with transformers' largest logit, given those before it. Tolerance: one token of ten, where
    another's is larger by up to half the logits' spread."""
    reference = hf_quantized.save(CONFIGS[name], FORMATS[form], tmp_path, max_shard_size="300KB")
    answers = _ours(tmp_path, room=6, block_size=8).generate(6, chunk)
    assert len({token for answer in answers for token in answer}) > 6
    short = []
    for prompt, answer in zip(_prompts(), answers, strict=True):
        logits = reference.logits(prompt + answer[:-1])[len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        short.append((logits.amax(1) - chosen) / logits.std(1))
    assert (torch.stack(short) == 0).float().mean() >= 0.9
    assert torch.stack(short).max() < 0.5


@pytest.mark.parametrize("form", ["fp8", "channels"])
def test_bfloat16_logits_are_near_transformers(form: str, tmp_path: Path) -> None:
    """Both round to 8 bits of significand, at different places, and then some values to the other of two 8-bit floats.
    Tolerance: the difference's standard deviation is at most 12 % of the logits' own, and ours is at most half as far
    again from float32 as transformers' is (each differs by about 7 %)."""
    reference = hf_quantized.save(CONFIGS["qwen3"], FORMATS[form], tmp_path)
    ours = _ours(tmp_path, "bfloat16").prefill().float()
    exact = torch.stack([reference.logits(prompt)[-1] for prompt in _prompts()])
    reference.model.bfloat16()
    theirs = torch.stack([reference.logits(prompt)[-1].float() for prompt in _prompts()])
    assert (ours - theirs).std() < 0.12 * exact.std()
    assert (ours - exact).std() < 1.5 * (theirs - exact).std()


def test_a_token_that_is_all_zeros_stays_so() -> None:
    values, scales = fp8.quantize(torch.zeros(2, 256), 128)
    assert fp8.dequantize(values, scales).eq(0).all()


def test_no_tokens() -> None:
    values, scales = fp8.quantize(torch.zeros(0, 256), 128)
    assert (values.shape, scales.shape) == ((0, 256), (0, 2))


# ---------------------------------------------------------------- checkpoints


def _load(directory: Path, dtype: str = "float32") -> weights.Weights:
    return weights.load(directory, load_config(directory), dtype, CPU)


def _tensors(loaded: weights.Weights) -> list[Tensor]:
    """Of the first layer's projections, values and scales."""
    layer = loaded.layers[0]
    found = []
    for weight in (layer.qkv, layer.output, layer.mlp.gate_up, layer.mlp.down):
        assert isinstance(weight, Fp8Weight)
        found += [weight.values, weight.scales]
    return found


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def _edit(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    file.unlink()
    save_file(tensors, file)


def _as_8_bits(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name].to(E4M3)})


def _put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


ATTENTION = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("name", "form", "edit", "words"),
    [
        (
            "llama",
            "fp8",
            _put(f"{ATTENTION}.k_proj.weight", torch.ones(128, 256, dtype=torch.bfloat16)),
            "k_proj.weight .* is torch.bfloat16, and must be torch.float8_e4m3fn: .* projections of all layers are",
        ),
        ("llama", "fp8", _as_8_bits("lm_head.weight"), "lm_head.weight .* is torch.float8_e4m3fn, and must not be"),
        ("llama", "channels", _as_8_bits("model.embed_tokens.weight"), "embed_tokens.weight .* must not be"),
        ("qwen2", "fp8", _as_8_bits("model.embed_tokens.weight"), "embed_tokens.weight .* must not be"),
        ("qwen3-moe", "fp8", _as_8_bits("model.layers.1.mlp.gate.weight"), r"layers\.1\.mlp\.gate\.weight .* not be"),
        ("mixtral", "channels", _as_8_bits("model.layers.0.block_sparse_moe.gate.weight"), r"gate\.weight .* not be"),
        ("llama", "fp8", _as_8_bits(f"{ATTENTION}.q_proj.weight_scale_inv"), "q_proj.weight_scale_inv .* must not be"),
        (
            "llama",
            "fp8",
            lambda tensors: tensors.pop(f"{ATTENTION}.o_proj.weight_scale_inv"),
            "lacks the tensor model.layers.0.self_attn.o_proj.weight_scale_inv",
        ),
        (
            "mixtral",
            "channels",
            lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight_scale"),
            "lacks the tensor model.layers.1.block_sparse_moe.experts.3.w2.weight_scale",
        ),
        (
            "llama",
            "fp8",
            _put(f"{ATTENTION}.q_proj.weight_scale_inv", torch.ones(2, 1)),
            r"q_proj.weight_scale_inv .* has shape \[2, 1\]; config.json asks for \[2, 2\]",
        ),
        (
            "llama",
            "channels",
            _put(f"{ATTENTION}.q_proj.weight_scale", torch.ones(1)),
            r"q_proj.weight_scale .* has shape \[1\]; config.json asks for \[256, 1\]",
        ),
        ("llama", "channels", _put(f"{ATTENTION}.q_proj.input_scale", torch.ones(1)), "holds .*q_proj.input_scale, wh"),
        ("llama", "fp8", _put(f"{ATTENTION}.q_proj.weight_scale", torch.ones(2, 2)), "holds .*q_proj.weight_scale, wh"),
    ],
)
def test_a_checkpoint_that_is_not_what_config_json_says(
    name: str, form: str, edit: Callable[[dict[str, Tensor]], None], words: str, tmp_path: Path
) -> None:
    hf_quantized.save(CONFIGS[name], FORMATS[form], tmp_path)
    _load(tmp_path)
    _edit(tmp_path, edit)
    with pytest.raises(ModelError, match=words):
        _load(tmp_path)


def test_8_bit_weights_that_config_json_does_not_tell_of(tmp_path: Path) -> None:
    hf_quantized.save(CONFIGS["llama"], CHANNELS, tmp_path)
    hf_quantized.change_config(tmp_path, quantization_config=None)
    with pytest.raises(
        ModelError, match=r"q_proj.weight .* is torch.float8_e4m3fn, and must not be: where config.json"
    ):
        _load(tmp_path)


def test_a_matrix_that_is_not_made_of_whole_blocks(tmp_path: Path) -> None:
    hf_models.save("llama", tmp_path)
    hf_quantized.change_config(tmp_path, quantization_config=FP8.config)
    said = "model.layers.0.self_attn.q_proj of 192 x 72 is not made of whole blocks of 128 x 128"
    with pytest.raises(ModelError, match=said):
        _load(tmp_path)
    with pytest.raises(ModelError, match=said):
        weights.dummy(load_config(tmp_path), "float32", CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_16_bits_are_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    hf_quantized.save(CONFIGS["llama"], CHANNELS, tmp_path, scale_dtype=dtype)
    stored = load_file(tmp_path / "model.safetensors")[f"{ATTENTION}.o_proj.weight_scale"]
    output = _load(tmp_path, "bfloat16").layers[0].output
    assert isinstance(output, Fp8Weight)
    assert (stored.dtype, output.scales.dtype) == (dtype, torch.float32)
    assert torch.equal(output.scales, stored.float())


@pytest.mark.parametrize("form", ["fp8", "channels"])
def test_parts_of_a_matrix_are_joined_with_their_scales(form: str, tmp_path: Path) -> None:
    hf_quantized.save(CONFIGS["qwen3-moe"], FORMATS[form], tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    layer = _load(tmp_path).layers[0]
    assert isinstance(layer.qkv, Fp8Weight)
    assert isinstance(layer.mlp, Experts)
    assert isinstance(layer.mlp.gate_up, Fp8Weight)
    for joined, parts in (
        (layer.qkv, [f"{ATTENTION}.{part}_proj" for part in "qkv"]),
        (layer.mlp.gate_up[5], [f"model.layers.0.mlp.experts.5.{part}_proj" for part in ("gate", "up")]),
    ):
        assert torch.equal(joined.values.float(), torch.cat([stored[f"{part}.weight"] for part in parts]).float())
        assert torch.equal(joined.scales, torch.cat([stored[f"{part}.{FORMATS[form].scales}"] for part in parts]))


def test_neighbours_in_the_file_are_joined_without_a_copy(tmp_path: Path) -> None:
    """In an order as a saver might choose: all that have a dtype together, by what they are multiplied by."""
    hf_quantized.save(CONFIGS["llama"], CHANNELS, tmp_path)
    copied = _load(tmp_path)
    _write_in_order(tmp_path / "model.safetensors")
    mapped = _load(tmp_path)
    assert _equal(_tensors(copied), _tensors(mapped))
    assert len({tensor.untyped_storage().data_ptr() for tensor in _tensors(mapped)}) == 1
    assert len({tensor.untyped_storage().data_ptr() for tensor in _tensors(copied)}) > 1


def _write_in_order(file: Path) -> None:
    """As safetensors, with q, k and v, and gate and up, next to each other, values and scales each for themselves."""
    order = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    tensors = load_file(file)

    def place(name: str) -> tuple[int, str, int]:
        where, _, what = name.rpartition(".")
        part = where.rpartition(".")[2]
        return -tensors[name].itemsize, f"{where.rpartition('.')[0]} {what}", [*order, part].index(part)

    header, data = {}, b""
    names = {torch.float32: "F32", E4M3: "F8_E4M3"}
    for name in sorted(tensors, key=place):
        tensor = tensors[name].clone()
        content = tensor.view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)  # so that data begins at a multiple of 64
    file.unlink()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_shards_hold_the_same_as_one_file(tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    hf_quantized.save(CONFIGS["qwen3-moe"], FP8, one)
    hf_quantized.save(CONFIGS["qwen3-moe"], FP8, many, max_shard_size="300KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    assert _equal(_tensors(_load(one)), _tensors(_load(many)))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("form", ["fp8", "channels"])
def test_dummy_weights_are_reproducible_and_tame(form: str, name: str, tmp_path: Path) -> None:
    hf_quantized.save(CONFIGS[name], FORMATS[form], tmp_path)
    config = load_config(tmp_path)
    first, again, other = (_tensors(weights.dummy(config, "bfloat16", CPU, seed)) for seed in (1, 1, 2))
    assert _equal(first, again)
    assert not torch.equal(first[0], other[0])
    expected = _tensors(_load(tmp_path))
    assert [(tensor.shape, tensor.dtype) for tensor in first] == [(tensor.shape, tensor.dtype) for tensor in expected]
    values, scales = first[6:]
    if values.dim() == 3:
        values, scales = values[0], scales[0]
    down = fp8.dequantize(values, scales)
    assert (down.std() * down.shape[1] ** 0.5).item() == pytest.approx(1, rel=0.05)
    assert values.float().unique().numel() > 100


def test_fingerprints_differ_with_scales_and_their_description(tmp_path: Path) -> None:
    hf_quantized.save(CONFIGS["llama"], CHANNELS, tmp_path)
    layout = KvLayout(num_blocks=10, num_layers=2, block_size=16, num_kv_heads=2, head_dim=64, dtype="float32")

    def now() -> str:
        return fingerprint.compute(tmp_path, "auto", "float32", layout)

    before = now()
    assert now() == before
    _edit(tmp_path, _put(f"{ATTENTION}.q_proj.weight_scale", torch.ones(256, 1)))
    scaled = now()
    hf_quantized.change_config(tmp_path, quantization_config=FP8.config)
    assert len({before, scaled, now()}) == 3
