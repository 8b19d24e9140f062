"""A model's weights, laid out as the model takes them: read from safetensors files, or random."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import structlog
import torch
from torch import Tensor
from tqdm import tqdm

from common.device import cpu_memory
from common.model import checkpoint
from common.model.dtypes import torch_dtype
from common.model.model_config import ModelConfig, Routing
from common.model.model_error import ModelError
from common.model.safetensors_files import map_tensors
from kernels.experts import Experts
from kernels.fp8 import E4M3, LARGEST, Fp8Weight, Weight
from kernels.linear import Mlp
from kernels.ops import LayerWeights
from kernels.packed import pack

log = structlog.get_logger(__name__)

_PROGRESS_AFTER_SECONDS = 1.0

# Of the memory that processes can have: for packed copies of what is mapped, and for all matrices beside their copies.
_PACKED_SHARE = 0.25

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

# (name in a Hugging Face checkpoint, shape, dtype) -> the tensor, on the wanted device
_Source = Callable[[str, tuple[int, ...], torch.dtype], Tensor]

_Pack = Callable[[Tensor], Tensor]

_DUMMY_SCALE = 2.0**-9  # of 8-bit floats, so that their values are far from the smallest and the largest


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [H]
    lm_head: Tensor  # [V, H]; the embedding's values if they are tied


def load(directory: Path, config: ModelConfig, dtype: str, device: torch.device) -> Weights:
    """Reads the safetensors files of a Hugging Face directory.

    On a CPU, matrices are packed (`kernels.packed`) if there is plenty of memory, and experts are copied. What else is
    stored in `dtype` stays in the mapped file, as 8-bit weights do: it is read as it is used, and workers of one host
    share the memory. So the file must not be changed while it is served.

    Args:
        directory: where the files are.
        config: the model's shape.
        dtype: "float32", "bfloat16" or "float16".
        device: where the weights go.

    Raises:
        ModelError: a file is damaged, or a tensor is missing, unknown, or of a wrong shape or dtype; it names both.
    """
    stored: dict[str, Tensor] = {}
    for file in checkpoint.files(directory):
        stored |= map_tensors(file)
    if config.tie_word_embeddings and _EMBEDDING not in stored and _HEAD in stored:
        stored[_EMBEDDING] = stored.pop(_HEAD)  # of the two that are one, some savers keep the other
    tied = config.tie_word_embeddings and not _has_own_head(stored)
    packing = _packing(stored.values(), torch_dtype(dtype)) if device.type == "cpu" else pack
    with tqdm(
        total=sum(tensor.nbytes for tensor in stored.values()),
        desc="loading weights",
        unit="B",
        unit_scale=True,
        delay=_PROGRESS_AFTER_SECONDS,
        leave=False,
        disable=None,  # but on a terminal, as in gguf_import.py
    ) as progress:

        def take(name: str, shape: tuple[int, ...], wanted: torch.dtype) -> Tensor:
            tensor = stored.pop(name, None)
            if tensor is None:
                raise ModelError(f"{directory} lacks the tensor {name}")
            if tensor.shape != shape:
                raise ModelError(
                    f"{name} in {directory} has shape {list(tensor.shape)}; config.json asks for {list(shape)}"
                )
            if E4M3 in (tensor.dtype, wanted) and tensor.dtype != wanted:
                raise ModelError(
                    f"{name} in {directory} is {tensor.dtype}, and must "
                    + ("not be" if wanted != E4M3 else f"be {wanted}")
                    + ": where config.json has a quantization_config, the projections of all layers are 8-bit floats, "
                    "and nothing else is"
                )
            progress.update(tensor.nbytes)
            return tensor.to(device, wanted)

        weights = _assemble(replace(config, tie_word_embeddings=tied), torch_dtype(dtype), take, packing)
    _refuse_leftovers(stored, directory, config)
    return weights


def dummy(config: ModelConfig, dtype: str, device: torch.device, seed: int = 0) -> Weights:
    """Random weights for benchmarks: the same for the same seed on the same kind of device.

    Norms are 1 and biases 0. The rest is normally distributed with variance 1 / inputs, which keeps activations in
    range in every dtype.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def make(name: str, shape: tuple[int, ...], wanted: torch.dtype) -> Tensor:
        try:
            tensor = torch.empty(shape, dtype=torch.float32 if wanted == E4M3 else wanted, device=device)
        except RuntimeError as error:
            raise ModelError(f"there is no room for {name} of shape {list(shape)}") from error
        if name.endswith("norm.weight"):
            return tensor.fill_(1.0)
        if name.endswith(".bias"):
            return tensor.zero_()
        if config.quantization is not None and name.endswith(config.quantization.scales):
            return tensor.fill_(_DUMMY_SCALE)
        tensor.normal_(0.0, shape[1] ** -0.5, generator=generator)
        return tensor.div_(_DUMMY_SCALE).clamp_(-LARGEST, LARGEST).to(E4M3) if wanted == E4M3 else tensor

    return _assemble(config, torch_dtype(dtype), make, pack)


def _packing(stored: Collection[Tensor], dtype: torch.dtype) -> _Pack:
    """How to pack matrices in the memory that there is. Copies of what would stay in the mapped file are counted; all
    else is copied anyway. A matrix that is kept beside its packed copy may be such a copy."""
    mapped, available = sum(tensor.nbytes for tensor in stored if tensor.dtype == dtype), cpu_memory.available_bytes()
    if mapped > _PACKED_SHARE * available:
        log.warning(
            "too little memory for weights in the layout that is fastest; they are used as they are in the file",
            weights_mib=mapped >> 20,
            free_mib=available >> 20,
        )
        return lambda weight: weight
    all_bytes = sum(tensor.numel() for tensor in stored) * dtype.itemsize
    return partial(pack, may_keep=all_bytes <= _PACKED_SHARE * available)


def _assemble(config: ModelConfig, dtype: torch.dtype, source: _Source, packing: _Pack) -> Weights:
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        return source(name, shape, dtype)

    def packed(weight: Weight) -> Weight:
        return packing(weight) if isinstance(weight, Tensor) else weight

    def projection(name: str, rows: int, columns: int) -> Weight:
        if (quantization := config.quantization) is None:
            return take(f"{name}.weight", (rows, columns))
        scales_shape = quantization.scales_shape(name, rows, columns)
        return Fp8Weight(
            source(f"{name}.weight", (rows, columns), E4M3),
            source(f"{name}.{quantization.scales}", scales_shape, torch.float32),
        )

    def mlp(prefix: str) -> Mlp:
        if config.joined_projections:
            gate_up = projection(f"{prefix}.mlp.gate_up_proj", 2 * intermediate, hidden)
        else:
            gate_up = _joined(
                [projection(f"{prefix}.mlp.{part}_proj", intermediate, hidden) for part in ("gate", "up")]
            )
        return Mlp(packed(gate_up), packed(projection(f"{prefix}.mlp.down_proj", hidden, intermediate)))

    def experts(prefix: str, routing: Routing) -> Experts:
        if config.architecture == "MixtralForCausalLM":
            block, (gate, up, down) = f"{prefix}.block_sparse_moe", ("w1", "w3", "w2")
        else:
            block, (gate, up, down) = f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj")

        def stacked(*parts: str, rows: int, columns: int) -> Weight:
            numbers = range(routing.experts)
            names = [f"{block}.experts.{number}.{part}" for number in numbers for part in parts]
            return _stacked((projection(name, rows, columns) for name in names), len(names), routing.experts)

        return Experts(
            router=take(f"{block}.gate.weight", (routing.experts, hidden)),
            gate_up=stacked(gate, up, rows=intermediate, columns=hidden),
            down=stacked(down, rows=hidden, columns=intermediate),
            per_token=routing.per_token,
            normalized=routing.normalized,
        )

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}"
        attention = f"{prefix}.self_attn"
        qkv = {"q": q_size, "k": kv_size, "v": kv_size}
        if config.joined_projections:
            qkv = {"qkv": sum(qkv.values())}
        return LayerWeights(
            attention_norm=take(f"{prefix}.input_layernorm.weight", (hidden,)),
            qkv=packed(_joined([projection(f"{attention}.{part}_proj", size, hidden) for part, size in qkv.items()])),
            qkv_bias=_end_to_end([take(f"{attention}.{part}_proj.bias", (size,)) for part, size in qkv.items()])
            if config.qkv_bias
            else None,
            q_norm=take(f"{attention}.q_norm.weight", (head_dim,)) if config.qk_norm else None,
            k_norm=take(f"{attention}.k_norm.weight", (head_dim,)) if config.qk_norm else None,
            output=packed(projection(f"{attention}.o_proj", hidden, q_size)),
            output_bias=take(f"{attention}.o_proj.bias", (hidden,)) if config.output_bias else None,
            mlp_norm=take(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
            mlp=mlp(prefix) if config.routing is None else experts(prefix, config.routing),
        )

    embedding = take(_EMBEDDING, (config.vocab_size, hidden))
    lm_head = embedding if config.tie_word_embeddings else take(_HEAD, (config.vocab_size, hidden))
    return Weights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config.num_layers)),
        norm=take("model.norm.weight", (hidden,)),
        lm_head=packing(lm_head),
    )


def _has_own_head(stored: Mapping[str, Tensor]) -> bool:
    """Whether there is an output head other than the embedding. transformers does not tie the two then, whatever
    config.json says."""
    head, embedding = stored.get(_HEAD), stored.get(_EMBEDDING)
    return head is not None and embedding is not None and not torch.equal(head.to(embedding.dtype), embedding)


def _joined(parts: Sequence[Weight]) -> Weight:
    """`parts` as one matrix, with the outputs of one after those of the other."""
    return _weight(_end_to_end(tensors) for tensors in zip(*map(_tensors, parts), strict=True))


def _stacked(parts: Iterator[Weight], count: int, experts: int) -> Weight:
    """`count` parts as a stack of `experts` matrices, each of which has as many of them, one after the other."""
    first = next(parts)
    stacks = [tensor.new_empty((count, *tensor.shape)) for tensor in _tensors(first)]
    # each to its place at once: a GPU's allocator keeps what was freed, here a second copy of a layer's experts
    for place, part in enumerate(chain([first], parts)):
        for stack, tensor in zip(stacks, _tensors(part), strict=True):
            stack[place] = tensor
    return _weight(stack.view(experts, -1, stack.shape[-1]) for stack in stacks)


def _tensors(weight: Weight) -> tuple[Tensor, ...]:
    return (weight.values, weight.scales) if isinstance(weight, Fp8Weight) else (weight,)


def _weight(tensors: Iterable[Tensor]) -> Weight:
    """The one that `_tensors` takes apart."""
    first, *scales = tensors
    return Fp8Weight(first, *scales) if scales else first


def _end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """`parts` joined along their first dimension, without a copy if they already lie end to end in memory."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(parts))
        end += part.nbytes
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _refuse_leftovers(stored: Iterable[str], directory: Path, config: ModelConfig) -> None:
    """Refuses tensors that the model does not have, except two that some checkpoints carry without need."""
    for name in stored:
        if not (name.endswith("rotary_emb.inv_freq") or (name == _HEAD and config.tie_word_embeddings)):
            raise ModelError(
                f"{directory} holds {name}, which {config.architecture} with this config.json does not have"
            )
