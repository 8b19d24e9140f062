"""Checks every kernel on a GPU against its torch reference, then times it against its floor.

    python -m benchmarks.gpu.kernels OUT.json [decode prefill rows fp8 experts sampling]

Times come from graph replays. The floor is the bytes that must move over the bandwidth of a copy in the same run, or
for prefill attention and many tokens of experts the operations over the rate of a matrix product. bfloat16; shapes of
Qwen3-0.6B, Llama-3.1-8B and Qwen3-30B-A3B.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import triton
from torch import Tensor

from benchmarks.gpu import experts, fp8
from benchmarks.gpu.graph_timing import graph_microseconds, launch_microseconds
from benchmarks.gpu.results import DEVICE, DTYPE, Ceilings, Result, randn, relative_error, sets_for
from benchmarks.gpu.timing import copy_bytes_per_second, gemm_operations_per_second
from kernels import activation, attention, norm, rope, sampling, step
from kernels.attention import PrefillAttention
from kernels.cuda import (
    triton_activation,
    triton_decode_attention,
    triton_norm,
    triton_prefill_attention,
    triton_rope,
    triton_sampling,
)

BLOCK_SIZE = 16
VOCAB = 151_936


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    has_q_norm: bool

    @property
    def token_bytes(self) -> int:
        """Of K and V in one layer."""
        return 2 * self.kv_heads * self.head_dim * DTYPE.itemsize


QWEN = Shape("0.6B", 16, 8, 128, 1024, 3072, True)
LLAMA = Shape("8B", 32, 8, 128, 4096, 14_336, False)
SMOL = Shape("135M", 9, 3, 64, 576, 1536, False)


def optional(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


FA2 = optional("flash_attn")
FA3 = optional("flash_attn_interface")


@dataclass(frozen=True, slots=True)
class Caches:
    """A pool of random KV over which sequences' blocks are scattered; a view for each layer."""

    views: list[tuple[Tensor, Tensor]]
    tables: Tensor
    lengths: Tensor

    @classmethod
    def scattered(
        cls, shape: Shape, lengths: list[int], layers: int, block_size: int, table_width: int = 0
    ) -> "Caches":
        counts = [-(-length // block_size) for length in lengths]
        total = sum(counts)
        pool = randn(total, layers, 2, block_size, shape.kv_heads, shape.head_dim)
        order = torch.randperm(total).int()
        tables = torch.zeros(len(lengths), max(table_width, *counts, 1), dtype=torch.int32)
        taken = 0
        for row, count in enumerate(counts):
            tables[row, :count] = order[taken : taken + count]
            taken += count
        return cls(
            [(pool[:, layer, 0], pool[:, layer, 1]) for layer in range(layers)],
            tables.to(DEVICE),
            torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        )

    def small_float_copy(self, rows: int, max_length: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first layer's blocks of the first rows, in float32, and their tables."""
        blocks = -(-max_length // self.views[0][0].shape[1])
        used = self.tables[:rows, :blocks]
        tables = torch.arange(used.numel(), dtype=torch.int32, device=DEVICE).view(used.shape)
        key_cache, value_cache = (cache[used.flatten().long()].float() for cache in self.views[0])
        return key_cache, value_cache, tables


def rotation_of(shape: Shape, positions: Tensor, slots: Tensor) -> rope.Rotation:
    """With angles and norms at random."""
    angles = torch.rand(int(positions.max()) + 1, shape.head_dim // 2, device=DEVICE) * 6.28
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    q_norm, k_norm = (randn(shape.head_dim), randn(shape.head_dim)) if shape.has_q_norm else (None, None)
    return rope.Rotation(positions, cos_sin, slots, q_norm, k_norm, 1e-6)


def new_tokens(shape: Shape, caches: Caches) -> tuple[Tensor, rope.Rotation]:
    """q, k and v of the last token of each sequence."""
    qkv = randn(len(caches.lengths), (shape.heads + 2 * shape.kv_heads) * shape.head_dim)
    positions, slots, _ = step.locate(caches.lengths - 1, caches.tables, BLOCK_SIZE)
    return qkv, rotation_of(shape, positions, slots)


def decode(ceilings: Ceilings) -> Iterator[Result]:
    mixed = torch.randint(100, 2049, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    yield from decode_case(ceilings, QWEN, "1 x 32768", [32_768])
    for shape in (QWEN, LLAMA):
        for context in (1024, 4096):
            for batch in (1, 8, 64, 256):
                yield from decode_case(ceilings, shape, f"{batch} x {context}", [context] * batch)
    yield from decode_case(ceilings, QWEN, "64 x 100..2048", mixed[:64])
    yield from decode_case(ceilings, QWEN, "256 x 100..2048", mixed)
    yield from decode_case(ceilings, SMOL, "64 x 1024", [1024] * 64)


def decode_case(ceilings: Ceilings, shape: Shape, case: str, lengths: list[int]) -> Iterator[Result]:
    case = f"{shape.name} {case}"
    layer_bytes = sum(lengths) * shape.token_bytes
    layers = sets_for(layer_bytes)
    floor = ceilings.moving(layer_bytes)
    # a table as wide as captured graphs have it: 32k tokens
    caches = Caches.scattered(shape, lengths, layers, BLOCK_SIZE, 32_768 // BLOCK_SIZE)
    qkv, rotation = new_tokens(shape, caches)
    scale = shape.head_dim**-0.5
    batch = triton_decode_attention.plan_decode(caches.tables, caches.lengths, caches.views[0][0])

    def ours(view: tuple[Tensor, Tensor]) -> Tensor:
        return triton_decode_attention.decode_attention(qkv, rotation, *view, batch, scale)

    key_cache, value_cache, tables = caches.small_float_copy(4, max(lengths[:4]))
    positions, slots, _ = step.locate(caches.lengths[:4] - 1, tables, BLOCK_SIZE)
    few = replace(
        rotation,
        positions=positions,
        slots=slots,
        q_norm=None if rotation.q_norm is None else rotation.q_norm.float(),
        k_norm=None if rotation.k_norm is None else rotation.k_norm.float(),
    )
    expected = attention.decode_attention(
        qkv[:4].float(),
        few,
        key_cache,
        value_cache,
        attention.plan_decode(tables, caches.lengths[:4], key_cache),
        scale,
    )
    error = relative_error(ours(caches.views[0])[:4], expected)
    calls = [partial(ours, view) for view in caches.views]
    yield Result("decode attention", case, error, graph_microseconds(calls), floor)
    if FA3:
        attend = FA3.flash_attn_with_kvcache
        q = randn(len(lengths), shape.heads, shape.head_dim)

        def theirs(view: tuple[Tensor, Tensor]) -> object:
            return attend(
                q[:, None],
                *view,
                cache_seqlens=caches.lengths,
                page_table=caches.tables,
                softmax_scale=scale,
                causal=True,
            )

        yield Result("  FA3", case, None, graph_microseconds([partial(theirs, view) for view in caches.views]), floor)
    if FA2 and shape.head_dim in (64, 128):
        del caches
        large = Caches.scattered(shape, lengths, layers, 256)
        attend = FA2.flash_attn_with_kvcache
        q = randn(len(lengths), shape.heads, shape.head_dim)

        def flash(view: tuple[Tensor, Tensor]) -> object:
            return attend(
                q[:, None],
                *view,
                cache_seqlens=large.lengths,
                block_table=large.tables,
                softmax_scale=scale,
                causal=True,
            )

        microseconds = graph_microseconds([partial(flash, view) for view in large.views])
        yield Result("  FA2, blocks of 256", case, None, microseconds, floor)


def prefill(ceilings: Ceilings) -> Iterator[Result]:
    for shape in (QWEN, LLAMA):
        yield from prefill_case(ceilings, shape, "8 x 1024", [1024] * 8, [1024] * 8)
        yield from prefill_case(ceilings, shape, "1 x 8192", [8192], [8192])
        yield from prefill_case(ceilings, shape, "8 x 1024 after 3072", [1024] * 8, [4096] * 8)


def prefill_case(
    ceilings: Ceilings, shape: Shape, case: str, query_lens: list[int], kv_lens: list[int]
) -> Iterator[Result]:
    case = f"{shape.name} {case}"
    pairs = sum(query * (2 * kv - query + 1) // 2 for query, kv in zip(query_lens, kv_lens, strict=True))
    floor = ceilings.computing(4 * pairs * shape.heads * shape.head_dim)
    caches = Caches.scattered(shape, kv_lens, 1, BLOCK_SIZE)
    key_cache, value_cache = caches.views[0]
    batch = PrefillAttention(
        tuple(query_lens),
        tuple(kv_lens),
        torch.tensor([0, *query_lens], device=DEVICE).cumsum(0).int(),
        caches.lengths,
        caches.tables,
    )
    tokens = [torch.arange(kv, device=DEVICE) for kv in kv_lens]
    tables = [caches.tables[row, token // BLOCK_SIZE] for row, token in enumerate(tokens)]
    where = (torch.cat(tables), torch.cat(tokens) % BLOCK_SIZE)
    packed_keys, packed_values = key_cache[where], value_cache[where]
    cu_kv_lens = torch.tensor([0, *kv_lens], device=DEVICE).cumsum(0).int()
    starts = cu_kv_lens.tolist()
    new = torch.cat([torch.arange(end - query, end) for end, query in zip(starts[1:], query_lens, strict=True)]).to(
        DEVICE
    )
    q, k, v = randn(sum(query_lens), shape.heads, shape.head_dim), packed_keys[new], packed_values[new]
    scale = shape.head_dim**-0.5

    def ours() -> Tensor:
        return triton_prefill_attention.prefill_attention(q, k, v, key_cache, value_cache, batch, scale)

    first = query_lens[0]
    alone = PrefillAttention((first,), (kv_lens[0],), batch.cu_query_lens[:2], batch.seq_lens[:1], caches.tables[:1])
    expected = attention.prefill_attention(
        q[:first].float(), k[:first].float(), v[:first].float(), key_cache.float(), value_cache.float(), alone, scale
    )
    error = relative_error(ours()[:first], expected)
    yield Result("prefill attention", case, error, graph_microseconds([ours]), floor)
    if FA2:
        attend = FA2.flash_attn_varlen_func

        def flash() -> object:
            return attend(
                q,
                packed_keys,
                packed_values,
                batch.cu_query_lens,
                cu_kv_lens,
                max(query_lens),
                max(kv_lens),
                softmax_scale=scale,
                causal=True,
            )

        yield Result("  FA2, all keys packed", case, None, graph_microseconds([flash]), floor)
    if FA3:
        attend = FA3.flash_attn_with_kvcache

        def paged() -> object:
            return attend(
                q,
                key_cache,
                value_cache,
                cache_seqlens=caches.lengths,
                page_table=caches.tables,
                cu_seqlens_q=batch.cu_query_lens,
                max_seqlen_q=max(query_lens),
                softmax_scale=scale,
                causal=True,
            )

        yield Result("  FA3, paged", case, None, graph_microseconds([paged]), floor)


def rows(ceilings: Ceilings) -> Iterator[Result]:
    for shape in (QWEN, LLAMA):
        for tokens in (1, 64, 256, 8192):
            yield from rows_case(ceilings, shape, tokens)


def rows_case(ceilings: Ceilings, shape: Shape, tokens: int) -> Iterator[Result]:
    case = f"{shape.name} {tokens} tokens"

    def timed(kernel: str, error: float, set_bytes: int, call: Callable[[int], object]) -> Result:
        calls = [partial(call, index) for index in range(sets)]
        return Result(kernel, case, error, graph_microseconds(calls), ceilings.moving(set_bytes))

    width = tokens * shape.hidden * DTYPE.itemsize
    sets = sets_for(2 * width)
    x, weight = randn(sets, tokens, shape.hidden), randn(shape.hidden)
    error = relative_error(triton_norm.rms_norm(x[0], weight, 1e-6), norm.rms_norm(x[0].float(), weight.float(), 1e-6))
    yield timed("RMS norm", error, 2 * width, lambda i: triton_norm.rms_norm(x[i], weight, 1e-6))

    width = tokens * shape.intermediate * DTYPE.itemsize
    sets = sets_for(3 * width)
    gate_up = randn(sets, tokens, 2 * shape.intermediate)
    error = relative_error(triton_activation.silu_mul(gate_up[0]), activation.silu_mul(gate_up[0].float()))
    yield timed("silu * up", error, 3 * width, lambda i: triton_activation.silu_mul(gate_up[i]))

    width = tokens * shape.head_dim * DTYPE.itemsize
    moved = width * (2 * shape.heads + 4 * shape.kv_heads)  # q, k read and rotated; k, v written, v read
    sets = sets_for(moved)
    qkv = randn(sets, tokens, (shape.heads + 2 * shape.kv_heads) * shape.head_dim)
    caches = Caches.scattered(shape, [tokens], sets, BLOCK_SIZE)
    positions = torch.arange(tokens, device=DEVICE)
    slots = caches.tables[0].long()[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    rotation = rotation_of(shape, positions, slots)

    def write(function: Callable[..., tuple[Tensor, ...]], projected: Tensor, view: tuple[Tensor, Tensor]) -> Tensor:
        return function(projected, rotation, *view)[0]

    expected = write(rope.rope_write_kv, qkv[0].clone(), caches.views[0])
    error = relative_error(write(triton_rope.rope_write_kv, qkv[0].clone(), caches.views[0]), expected)
    yield timed(
        "norm + rope + KV write",
        error,
        moved,
        lambda i: write(triton_rope.rope_write_kv, qkv[i], caches.views[i]),
    )


SAMPLING = [  # name, spread of the logits, temperature, top-k, top-p, min-p
    ("greedy", 1.0, 0.0, 0, 1.0, 0.0),
    ("temperature", 1.0, 0.6, 0, 1.0, 0.0),
    ("top-k 50", 1.0, 0.6, 50, 1.0, 0.0),
    ("top-p 0.9 peaked", 4.0, 0.6, 0, 0.9, 0.0),
    ("top-p 0.9 flat", 1.0, 1.0, 0, 0.9, 0.0),
    ("top-k 50, top-p 0.9", 2.0, 0.6, 50, 0.9, 0.0),
    ("min-p 0.05", 2.0, 0.6, 0, 1.0, 0.05),
    ("top-k 1000", 1.0, 1.0, 1000, 1.0, 0.0),
]


def sample(ceilings: Ceilings) -> Iterator[Result]:
    for batch in (1, 64, 256):
        for name, spread, temperature, top_k, top_p, min_p in SAMPLING:
            yield sample_case(ceilings, f"{batch}: {name}", batch, spread, temperature, top_k, top_p, min_p)
        logits = randn(sets_for(batch * VOCAB * DTYPE.itemsize), batch, VOCAB)
        argmax = graph_microseconds([partial(torch.argmax, part, -1) for part in logits])
        yield Result("  torch.argmax", f"{batch}", None, argmax, ceilings.moving(batch * VOCAB * DTYPE.itemsize))


def sample_case(
    ceilings: Ceilings, case: str, batch: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> Result:
    sets = sets_for(batch * VOCAB * DTYPE.itemsize)
    logits = randn(sets, batch, VOCAB) * spread
    settings = sampling.SamplingRows(
        torch.full((batch,), temperature, device=DEVICE),
        torch.full((batch,), top_k, dtype=torch.int32, device=DEVICE),
        torch.full((batch,), top_p, device=DEVICE),
        torch.full((batch,), min_p, device=DEVICE),
        torch.randint(-(2**63), 2**63 - 1, (batch,), device=DEVICE),
    )
    positions = torch.arange(batch, dtype=torch.int32, device=DEVICE)
    # the share of rows with another token; one is none: sums round differently, now and then a draw falls between
    differing = sum(
        int((triton_sampling.sample(part, settings, positions) != sampling.sample(part, settings, positions)).sum())
        for part in logits
    )
    error = max(differing - 1, 0) / (batch * len(logits))
    calls = [partial(triton_sampling.sample, part, settings, positions) for part in logits]
    return Result("sample", case, error, graph_microseconds(calls), ceilings.moving(batch * VOCAB * DTYPE.itemsize))


PARTS: dict[str, Callable[[Ceilings], Iterator[Result]]] = {
    "decode": decode,
    "prefill": prefill,
    "rows": rows,
    "fp8": fp8.products,
    "experts": experts.mixtures,
    "sampling": sample,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file for the figures")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")

    torch.manual_seed(0)
    ceilings = Ceilings(copy_bytes_per_second(DEVICE), gemm_operations_per_second(DEVICE))
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_gb_per_s": ceilings.bandwidth / 1e9,
        "gemm_tflop_per_s": ceilings.gemm / 1e12,
        "launch_microseconds": launch_microseconds(),
    }
    print(*(f"{name} {value}" for name, value in machine.items()), sep="; ")
    print(f"{'kernel':26} {'case':24} {'error':>8} {'us':>9} {'floor us':>9} {'of floor':>7}")
    results = []
    for part in arguments.parts or PARTS:
        for result in PARTS[part](ceilings):
            print(result.line(), flush=True)
            results.append(result)
        torch.cuda.empty_cache()
    arguments.out.write_text(json.dumps({**machine, "results": [asdict(result) for result in results]}, indent=1))
    wrong = [result for result in results if result.error is not None and not result.error <= result.tolerance]
    print(f"{len(wrong)} wrong" if wrong else "all outputs agree with the references")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
