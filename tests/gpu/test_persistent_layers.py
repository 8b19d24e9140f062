"""All layers of a step in one launch, against the references of its operations one after another."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from common.device.graph_capture import capture
from kernels import attention, linear, step
from kernels.cuda.persistent_layers import fuse_layers
from kernels.fp8 import Weight
from kernels.hidden import Hidden
from kernels.linear import Mlp
from kernels.ops import FusedLayers, LayerWeights
from kernels.rope import Rotation
from tests.kernels.inputs import DEVICE, assert_close

EPS = 1e-6
VOCAB, TOKEN = 50, 7
LAYERS = 2


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    kv_heads: int
    group: int
    head_dim: int
    block_size: int = 16
    with_norm: bool = False
    with_bias: bool = False


SHAPES = {
    "SmolLM2-135M": Shape(576, 1536, 3, 3, 64),
    "Qwen3-0.6B": Shape(1024, 3072, 8, 2, 128, with_norm=True),
    "Qwen2.5-0.5B": Shape(896, 4864, 2, 7, 64, with_bias=True),
    "Llama-3.2-1B": Shape(2048, 8192, 8, 4, 64),
    "Qwen3-1.7B": Shape(2048, 6144, 8, 2, 128, with_norm=True),
    "small": Shape(256, 512, 2, 2, 64, block_size=8, with_norm=True, with_bias=True),
    "one KV head": Shape(192, 320, 1, 4, 128, block_size=32),
    "no groups": Shape(512, 1024, 16, 1, 64),
    "few tiles": Shape(8192, 2432, 1, 4, 64),
}


def randn(*sizes: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE, dtype=dtype)


def layer_weights(shape: Shape, seed: int, dtype: torch.dtype) -> LayerWeights:
    heads = shape.kv_heads * shape.head_dim

    def make(index: int, *sizes: int) -> Tensor:
        return randn(*sizes, dtype=dtype, seed=100 * seed + index).div_(sizes[-1] ** 0.5)

    def norm(index: int, size: int) -> Tensor:
        return 1 + make(index, size)

    return LayerWeights(
        attention_norm=norm(0, shape.hidden),
        qkv=make(1, (shape.group + 2) * heads, shape.hidden),
        qkv_bias=make(2, (shape.group + 2) * heads) if shape.with_bias else None,
        q_norm=norm(3, shape.head_dim) if shape.with_norm else None,
        k_norm=norm(4, shape.head_dim) if shape.with_norm else None,
        output=make(5, shape.hidden, shape.group * heads),
        output_bias=make(6, shape.hidden) if shape.with_bias else None,
        mlp_norm=norm(7, shape.hidden),
        mlp=Mlp(make(8, 2 * shape.intermediate, shape.hidden), make(9, shape.hidden, shape.intermediate)),
    )


@dataclass(frozen=True)
class Case:
    layers: tuple[LayerWeights, ...]
    embedding: Tensor
    cos_sin: Tensor
    pool: Tensor  # NaN where nothing is cached
    block_table: Tensor
    tokens: Tensor
    fused: FusedLayers


def make_case(shape: Shape, cached: int, room: int = 4) -> Case:
    """`cached` tokens in blocks all over the pool, and room for some more."""
    dtype = torch.bfloat16
    count = -(-(cached + room) // shape.block_size)
    pool = torch.full(
        (count + 5, LAYERS, 2, shape.block_size, shape.kv_heads, shape.head_dim),
        torch.nan,
        dtype=dtype,
        device=DEVICE,
    )
    blocks = torch.randperm(count + 5, generator=torch.Generator().manual_seed(3)).to(DEVICE)[:count]
    at = torch.arange(cached, device=DEVICE)
    entries = randn(cached, LAYERS, 2, shape.kv_heads, shape.head_dim, dtype=dtype, seed=4)
    pool[blocks[at // shape.block_size], :, :, at % shape.block_size] = entries
    angles = torch.outer(torch.arange(cached + room), 10_000.0 ** -torch.linspace(0, 1, shape.head_dim // 2))
    layers = tuple(layer_weights(shape, index, dtype) for index in range(LAYERS))
    embedding = randn(VOCAB, shape.hidden, dtype=dtype, seed=5)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).float().to(DEVICE)
    fused = fuse_layers(layers, embedding, cos_sin, EPS, pool)
    assert fused is not None
    table = torch.zeros((1, count + 2), dtype=torch.int32, device=DEVICE)
    table[0, :count] = blocks
    tokens = torch.tensor([TOKEN], dtype=torch.int32, device=DEVICE)
    return Case(layers, embedding, cos_sin, pool, table, tokens, fused)


def run(case: Case, lengths: Tensor) -> Tensor:
    positions, slots, seq_lens = step.locate(lengths, case.block_table, case.pool.shape[3])
    return case.fused(case.tokens, positions, slots.long(), seq_lens, case.block_table)


def expected(case: Case, pool: Tensor, lengths: Tensor) -> Tensor:
    """In float64, and K and V into `pool`, of float64 as well."""
    positions, slots, seq_lens = step.locate(lengths, case.block_table, pool.shape[3])

    def wide(weight: Weight) -> Tensor:
        assert isinstance(weight, Tensor)
        return weight.double()

    def optional(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    hidden = Hidden(case.embedding.double()[case.tokens.long()])
    for index, layer in enumerate(case.layers):
        keys, values = pool[:, index, 0], pool[:, index, 1]
        qkv = linear.norm_linear(hidden, layer.attention_norm.double(), EPS, wide(layer.qkv), optional(layer.qkv_bias))
        rotation = Rotation(
            positions, case.cos_sin.double(), slots, optional(layer.q_norm), optional(layer.k_norm), EPS
        )
        plan = attention.plan_decode(case.block_table, seq_lens, keys)
        attended = attention.decode_attention(qkv, rotation, keys, values, plan, pool.shape[-1] ** -0.5).flatten(1)
        hidden = linear.add_linear(hidden, attended, wide(layer.output), optional(layer.output_bias), None)
        assert isinstance(layer.mlp, Mlp)
        activated = linear.norm_gated_linear(hidden, layer.mlp_norm.double(), EPS, wide(layer.mlp.gate_up))
        hidden = linear.add_linear(hidden, activated, wide(layer.mlp.down), None, None)
    return hidden.states


def check_steps(case: Case, lengths: Sequence[int]) -> None:
    state = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for length in lengths:
        state.fill_(length)
        pool = case.pool.double().nan_to_num()  # the reference gathers what lies behind a sequence as well
        before = case.pool.isnan()
        assert_close(run(case, state), expected(case, pool, state))
        written = ~case.pool.isnan()
        assert_close(case.pool[written], pool[written])
        assert (before & written).sum() == (case.pool[0, :, :, 0].numel() if length >= 0 else 0)


@pytest.mark.parametrize("name", SHAPES)
def test_layers(name: str) -> None:
    for cached in (0, 1, 16, 100, 1000, 9000):  # one test, as the kernel is compiled once for each process
        check_steps(make_case(SHAPES[name], cached), range(cached, cached + 3))


def test_no_sequence() -> None:
    """As a graph's capture has it: nothing is written."""
    case = make_case(SHAPES["Qwen3-0.6B"], 20)
    run(case, torch.full((1,), -1, dtype=torch.int32, device=DEVICE))
    check_steps(case, [20])


def test_replays_of_a_graph() -> None:
    """Also of lengths that other programs work on than when it was captured, and with more launches than there are
    numbers of layers in a byte."""
    case = make_case(SHAPES["SmolLM2-135M"], 3000)
    lengths = torch.full((1,), 3, dtype=torch.int32, device=DEVICE)
    graph, hidden = capture(partial(run, case, lengths), torch.cuda.graph_pool_handle())
    for length in (0, 3000, 17, 2999, *range(200, 400)):
        lengths.fill_(length)
        graph.replay()
        if length < 200 or length > 390:
            assert_close(hidden, expected(case, case.pool.double().nan_to_num(), lengths))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(4096, 14_336, 8, 4, 128),  # a layer has more to read than what this saves
        Shape(576, 1536, 3, 3, 80),
        Shape(600, 1536, 3, 3, 64),
        Shape(1024, 3072, 8, 5, 128),
        Shape(4096, 1024, 16, 1, 64),
    ],
)
def test_other_shapes_are_left_to_the_kernels(shape: Shape) -> None:
    layer = layer_weights(shape, 0, torch.bfloat16)
    pool = torch.zeros((4, 1, 2, 16, shape.kv_heads, shape.head_dim), dtype=torch.bfloat16, device=DEVICE)
    embedding = torch.zeros((VOCAB, shape.hidden), dtype=torch.bfloat16, device=DEVICE)
    assert fuse_layers([layer], embedding, torch.zeros(1, device=DEVICE), EPS, pool) is None
    fits = SHAPES["small"]
    pool = torch.zeros((4, 1, 2, 16, fits.kv_heads, fits.head_dim), dtype=torch.float8_e4m3fn, device=DEVICE)
    embedding = torch.zeros((VOCAB, fits.hidden), dtype=torch.bfloat16, device=DEVICE)
    layers = [layer_weights(fits, 0, torch.bfloat16)]
    assert fuse_layers(layers, embedding, torch.zeros(1, device=DEVICE), EPS, pool) is None
    pool = torch.zeros((4, 1, 2, 8, fits.kv_heads, fits.head_dim), device=DEVICE)
    embedding = torch.zeros((VOCAB, fits.hidden), device=DEVICE)
    layers = [layer_weights(fits, 0, torch.float32)]
    assert fuse_layers(layers, embedding, torch.zeros(1, device=DEVICE), EPS, pool) is None
