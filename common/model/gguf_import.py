"""A GGUF file as a Hugging Face directory: config.json, model.safetensors, tokenizer.json, tokenizer_config.json."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor, TokenType
from gguf.quants import dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from common.model.model_config import parse_config
from common.model.model_error import ModelError

_CACHE_LINE = 64
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(source: Path, target: Path) -> None:
    """Writes the model of the GGUF file `source` into the existing directory `target`.

    Weights are stored as float32. No smaller type holds a quantized weight (scale times a small integer, plus an
    offset) exactly, and a worker that serves float32, the default on a CPU, can use the file as it is.

    Raises:
        ModelError: the file is damaged, or of another architecture or kind of tokenizer.
        OSError: the target cannot be written to.
    """
    try:
        _convert(source, target)
    except (ModelError, OSError):
        raise
    except Exception as error:  # the libraries raise many kinds for a damaged file
        raise ModelError(f"{source} is damaged, or no GGUF file of this kind: {error!r}") from error


def _convert(source: Path, target: Path) -> None:
    reader = _Reader(source)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    if metadata["general.architecture"] != "llama":
        raise ModelError(f"{source} holds the architecture {metadata['general.architecture']}; supported is llama")
    names = {tensor.name for tensor in reader.tensors}
    config = _config(metadata, tied="output.weight" not in names)
    parse_config(config)
    _write_json(target / "config.json", config)
    # not by its save(), which raises a plain Exception for a full disk, too
    (target / "tokenizer.json").write_text(_tokenizer(metadata).to_str(pretty=True), encoding="utf-8")
    _write_json(target / "tokenizer_config.json", _tokenizer_config(metadata))
    _write_safetensors(target / "model.safetensors", _tensors(reader), config)


class _Reader(GGUFReader):
    """The library's reader, except that it refuses to read beyond the file's end, where it would find absurd counts and
    loop for years."""

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> NDArray[Any]:
        if not 0 <= int(offset) + np.dtype(dtype).itemsize * int(count) <= len(self.data):
            raise ModelError(f"{self.data.filename} is cut short: something in it lies beyond its end")
        return super()._get(offset, dtype, count, override_order)


def _config(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _tensors(reader: GGUFReader) -> dict[str, ReaderTensor]:
    """The file's tensors by their Hugging Face names, layer by layer. Each layer's q, k and v, and its gate and up, are
    neighbours, so that a reader gets them as one matrix without a copy."""
    places = {kind: place for place, kind in enumerate(_LAYER_TENSORS)}
    named: dict[tuple[int, int], tuple[str, ReaderTensor]] = {}
    for index, tensor in enumerate(reader.tensors):
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            layer, kind = int(parts[1]), parts[2]
            named[layer, places[kind]] = (f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.weight", tensor)
        else:
            named[-1, index] = (f"{_TENSORS[parts[0]]}.weight", tensor)
    return dict(value for _, value in sorted(named.items()))


def _write_safetensors(path: Path, tensors: dict[str, ReaderTensor], config: dict[str, Any]) -> None:
    """Writes the tensors as float32, one at a time.

    The safetensors library would sort them by name and align them to 8 bytes. Here they keep their order, and the data
    starts at a multiple of a cache line, which is fastest for a CPU that maps the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        size = 4 * int(tensor.n_elements)
        header[name] = {"dtype": "F32", "shape": tensor.shape[::-1].tolist(), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _CACHE_LINE)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tqdm(
            tensors.values(),
            desc="unpacking the embedded model",
            unit="tensor",
            leave=False,
            disable=None,  # but on a terminal: elsewhere a bar becomes the beginning of the next line of the log
        ):
            file.write(_dequantized(tensor, config).data)  # not by tofile(), whose OSError has no reason in it


def _dequantized(tensor: ReaderTensor, config: dict[str, Any]) -> NDArray[np.float32]:
    values = dequantize(tensor.data, tensor.tensor_type)
    if tensor.name.endswith(".attn_q.weight"):
        return _unpermuted(values, config["num_attention_heads"])
    if tensor.name.endswith(".attn_k.weight"):
        return _unpermuted(values, config["num_key_value_heads"])
    return values


def _unpermuted(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """GGUF pairs neighbouring rows of a head for its rotary embedding; Hugging Face pairs row i with i + head_dim/2."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    kind, splitting = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if (kind, splitting) != ("gpt2", "smollm"):
        raise ModelError(f"a GGUF tokenizer of the kind {kind}/{splitting} is not supported; supported is gpt2/smollm")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == TokenType.CONTROL
        ]
    )
    return tokenizer


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
