"""All layers of a decode step of one sequence on CUDA, in one launch. The kernel is in persistent_layers.cu.

At batch 1, a step of a small model is a chain of five short kernels per layer. Most of their time is spent starting and
ending, while no memory is read. A single persistent kernel whose thread blocks pass results to each other keeps reading
while they wait ("No Bubbles", Hazy Research, 2025, does so for Llama-1B). It is written in CUDA C++ because Triton does
not offer a producer warp that streams weights through shared memory, atomic words shared by thread blocks, or control
over the size of the code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import e, log2

import cupy
import numpy as np
import torch
from torch import Tensor

from kernels.cuda import cuda_source
from kernels.cuda.gpu import is_hopper_or_later, multiprocessors, shared_bytes
from kernels.experts import Experts
from kernels.fp8 import Fp8Weight
from kernels.linear import Mlp
from kernels.ops import LayerWeights

_THREADS = 288
_TILE_BYTES = 16 << 10
_SHARED_BYTES = 200 << 10  # with less shared memory, the ring would be too short
_MOST_ROWS = 128  # of a weight, in a thread block
_LAYER_WEIGHTS = 1 << 26  # elements of a layer; with more, kernels one by one are faster (docs/kernels.md)

_POINTERS = (
    "weights token embedding out qkv hidden activated parts scales shares number position slot seq_len cos_sin "
    "block_table pool"
)
_STRIDES = "layer_stride value_offset block_stride token_stride head_stride"
_ARGUMENTS = np.dtype(  # struct Arguments
    [
        *((name, np.uint64) for name in _POINTERS.split()),
        *((name, np.int64) for name in _STRIDES.split()),
        *{"layers": np.int32, "eps": np.float32, "scale": np.float32, "padding": np.int32}.items(),
    ]
)


@dataclass(frozen=True, slots=True)
class _Shape:
    hidden: int
    intermediate: int
    kv_heads: int
    group: int  # query heads of each KV head
    head_dim: int
    block_size: int
    pieces: int  # thread blocks for each KV head

    @property
    def suits(self) -> bool:
        """Whether the kernel supports this shape: rows are whole vectors, and a thread block can hold its part of each
        weight."""
        layer = self.hidden * ((self.group * 2 + 2) * self.kv_heads * self.head_dim + 3 * self.intermediate)
        rows = max((self.group + 2) * self.head_dim, self.hidden, self.intermediate // self.kv_heads)
        return (
            self.hidden % 64 == 0
            and self.intermediate % 64 == 0
            and 2 * max(self.hidden, self.intermediate) <= _TILE_BYTES
            and self.head_dim in (64, 128)
            and self.group * self.head_dim <= 512
            and self.kv_heads <= 16
            and rows <= _MOST_ROWS * self.pieces
            and layer <= _LAYER_WEIGHTS
        )


def fuse_layers(
    layers: Sequence[LayerWeights], embedding: Tensor, cos_sin: Tensor, eps: float, pool: Tensor
) -> "PersistentLayers | None":
    """`kernels.ops.fuse_layers` for CUDA tensors. None if the layers have experts or 8-bit weights, if the kernel does
    not support the GPU, the model's shape or its dtype, or if it would be slower than kernels one by one."""
    device, first = pool.device, layers[0]
    if isinstance(first.mlp, Experts) or isinstance(first.qkv, Fp8Weight):
        return None
    kv_heads, head_dim = pool.shape[4:]
    shape = _Shape(
        hidden=embedding.shape[1],
        intermediate=first.mlp.down.shape[1],
        kv_heads=kv_heads,
        group=first.output.shape[1] // (kv_heads * head_dim),
        head_dim=head_dim,
        block_size=pool.shape[3],
        pieces=multiprocessors(device) // kv_heads,
    )
    if pool.dtype != torch.bfloat16 or not is_hopper_or_later(device):
        return None
    if shared_bytes(device) < _SHARED_BYTES or not shape.suits:
        return None
    return PersistentLayers(shape, layers, embedding, cos_sin, eps, pool)


class PersistentLayers:
    """The compiled kernel for one model. Its calls must not overlap in time: all use the same buffers in global
    memory."""

    def __init__(
        self,
        shape: _Shape,
        layers: Sequence[LayerWeights],
        embedding: Tensor,
        cos_sin: Tensor,
        eps: float,
        pool: Tensor,
    ) -> None:
        self._grid = shape.kv_heads * shape.pieces
        self._kernel = _compiled(shape, layers[0], pool.device)
        self._dtype, self._hidden_size = pool.dtype, shape.hidden
        self._layers = tuple(layers)  # kept alive: the table below holds their addresses
        self._tensors = {
            "weights": torch.tensor([_addresses(layer) for layer in layers], dtype=torch.int64, device=pool.device),
            "embedding": embedding,
            "cos_sin": cos_sin,
            "pool": pool,
            **_exchanged(shape, pool.device),
        }
        self._arguments = np.zeros((), _ARGUMENTS)
        for name, tensor in self._tensors.items():
            self._arguments[name] = tensor.data_ptr()
        block, layer, value, token, head, _ = pool.stride()
        for name, stride in zip(_STRIDES.split(), (layer, value, block, token, head), strict=True):
            self._arguments[name] = stride
        self._arguments["layers"] = len(layers)
        self._arguments["eps"] = eps
        self._arguments["scale"] = shape.head_dim**-0.5 * log2(e)

    def __call__(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, seq_lens: Tensor, block_tables: Tensor
    ) -> Tensor:
        out = torch.empty((1, self._hidden_size), dtype=self._dtype, device=tokens.device)
        arguments = self._arguments.copy()
        given = {
            "token": tokens,
            "out": out,
            "position": positions,
            "slot": slots,
            "seq_len": seq_lens,
            "block_table": block_tables,
        }
        for name, tensor in given.items():
            arguments[name] = tensor.data_ptr()
        stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(tokens.device))
        with cupy.cuda.Device(tokens.device.index), stream:
            self._kernel((self._grid,), (_THREADS,), (arguments,), shared_mem=shared_bytes(tokens.device))
        return out


def _compiled(shape: _Shape, layer: LayerWeights, device: torch.device) -> cupy.RawKernel:
    macros = {
        "HIDDEN": shape.hidden,
        "INTERMEDIATE": shape.intermediate,
        "KV_HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "HEAD_DIM": shape.head_dim,
        "PIECES": shape.pieces,
        "BLOCK_SIZE": shape.block_size,
        "TILE_BYTES": _TILE_BYTES,
        "SHARED_BYTES": shared_bytes(device),
        "QK_NORM": int(layer.q_norm is not None),
        "HAS_QKV_BIAS": int(layer.qkv_bias is not None),
        "HAS_OUTPUT_BIAS": int(layer.output_bias is not None),
    }
    with cupy.cuda.Device(device.index):
        kernel = cupy.RawKernel(
            cuda_source.read("persistent_layers.cu"),
            "persistent_layers",
            options=("-std=c++17", *(f"-D{name}={value}" for name, value in macros.items())),
            enable_cooperative_groups=True,  # a cooperative launch: all thread blocks are resident at once, or none is
        )
        kernel.max_dynamic_shared_size_bytes = shared_bytes(device)
    return kernel


def _addresses(layer: LayerWeights) -> list[int]:
    """In the order of the kernel's enum WEIGHTS."""
    mlp = layer.mlp
    assert isinstance(mlp, Mlp)
    tensors = (
        layer.qkv, layer.output, mlp.gate_up, mlp.down, layer.attention_norm, layer.mlp_norm,
        layer.q_norm, layer.k_norm, layer.qkv_bias, layer.output_bias,
    )  # fmt: skip
    assert not any(isinstance(tensor, Fp8Weight) for tensor in tensors)
    return [tensor.data_ptr() if isinstance(tensor, Tensor) else 0 for tensor in tensors]


def _exchanged(shape: _Shape, device: torch.device) -> dict[str, Tensor]:
    """Buffers through which thread blocks pass results to each other, in words of 8 or 16 bytes. They begin as zeros,
    since no layer has the number 0."""
    pieces, columns = shape.kv_heads * shape.pieces, shape.group * shape.head_dim
    eights = {
        "qkv": shape.kv_heads * (columns + 2 * shape.head_dim) // 2,
        "hidden": shape.hidden // 2,
        "activated": shape.intermediate // 2,
        "parts": 2 * pieces * columns // 4,
        "scales": pieces * shape.group,
        "shares": 2 * shape.kv_heads * shape.hidden // 4,
    }
    words = {name: torch.zeros(count, dtype=torch.int64, device=device) for name, count in eights.items()}
    return {**words, "number": torch.ones(1, dtype=torch.int32, device=device)}
