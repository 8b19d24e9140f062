"""How the constants of the Triton kernels were chosen: times of many ways to cut the work, beside what is served now
and, for linear layers, the library.

    python -m benchmarks.gpu.sweep OUT.json [linear decode prefill]

Compiles in as many processes as there are cores, then times one after another, by replays of graphs that rotate through
enough memory to miss the L2 cache.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.graph_timing import graph_microseconds
from benchmarks.gpu.kernels import BLOCK_SIZE, LLAMA, QWEN, Caches, Shape, new_tokens
from benchmarks.gpu.results import DEVICE, DTYPE, randn, sets_for
from benchmarks.gpu.timing import copy_bytes_per_second, gemm_operations_per_second
from kernels.attention import DecodeAttention, PrefillAttention
from kernels.cuda import (
    fastest_linear,
    triton_decode_attention,
    triton_few_rows,
    triton_prefill_attention,
    triton_tiled_linear,
)
from kernels.cuda.triton_few_rows import Cut
from kernels.cuda.triton_tiled_linear import Tile
from kernels.hidden import Hidden

Calls = list[Callable[[], object]]
SERVED = "served"
LIBRARY = "library"


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one input; `calls` makes the inputs."""

    name: str
    floor_bytes: float
    floor_operations: float
    calls: Callable[[int], Calls]  # given the most memory sets to rotate through
    ways: tuple[str, ...]  # keys of WAYS


@dataclass(frozen=True, slots=True)
class Layer:
    name: str
    kind: str  # norm, gated or add
    outputs: int
    inputs: int


LAYERS = [
    Layer("0.6B qkv", "norm", 4096, 1024),
    Layer("0.6B output", "add", 1024, 2048),
    Layer("0.6B gate_up", "gated", 3072, 1024),
    Layer("0.6B down", "add", 1024, 3072),
    Layer("0.6B lm_head", "norm", 151_936, 1024),
    Layer("8B qkv", "norm", 6144, 4096),
    Layer("8B output", "add", 4096, 4096),
    Layer("8B gate_up", "gated", 14_336, 4096),
    Layer("8B down", "add", 4096, 14_336),
    Layer("8B lm_head", "norm", 128_256, 4096),
]
FEW_ROWS = [Cut(*cut) for cut in ((4, 1024, 4), (8, 1024, 4), (16, 1024, 4), (8, 2048, 4), (4, 4096, 4), (16, 1024, 8))]
TILES = [
    Tile(*cut)
    for cut in (
        (16, 16, 128, 1, 4),
        (16, 16, 128, 4, 6),
        (16, 32, 128, 1, 4),
        (32, 16, 128, 1, 4),
        (32, 16, 128, 4, 6),
        (32, 32, 128, 1, 4),
        (64, 16, 128, 1, 6),
        (64, 16, 128, 2, 6),
        (64, 32, 128, 1, 4),
        (64, 32, 128, 1, 6),
        (64, 32, 128, 2, 6),
        (64, 32, 128, 4, 6),
        (64, 64, 64, 1, 4),
        (64, 64, 128, 1, 4),
        (64, 128, 64, 1, 4),
        (64, 128, 128, 1, 4),
    )
]
DECODE_TILES = [(32, 4, 2), (64, 4, 3), (32, 4, 3), (64, 4, 2)]  # keys a step, warps, stages
PROGRAMS_PER_SM = [2, 3, 4, 6, 8, 12]
PREFILL_TILES = [  # queries, keys a step, warps, stages
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 128, 8, 2),
    (128, 32, 4, 3),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
]


def always(value: object, *_: object) -> object:
    return value


def never(*_: object) -> bool:
    return False


def _ways() -> dict[str, tuple[tuple[object, str, object], ...]]:
    """What is replaced in which module to get a way."""
    ways: dict[str, tuple[tuple[object, str, object], ...]] = {
        SERVED: (),
        LIBRARY: ((fastest_linear, "_few", never), (fastest_linear, "suits_tiles", never)),
    }
    for few in FEW_ROWS:
        ways[str(few)] = (
            (triton_few_rows, "_cut", partial(always, few)),
            (fastest_linear, "_SMALL_WEIGHT", 1 << 62),
        )
    for tile in TILES:
        ways[str(tile)] = (
            (fastest_linear, "_few", never),
            (fastest_linear, "_SMALL_WEIGHT", 1 << 62),
            (triton_tiled_linear, "_tile", partial(always, tile)),
        )
    for decode_tile in DECODE_TILES:
        for programs in PROGRAMS_PER_SM:
            ways[f"{decode_tile}, {programs} a SM"] = (
                (triton_decode_attention, "_tile", partial(always, decode_tile)),
                (triton_decode_attention, "_PROGRAMS_PER_SM", programs),
            )
    for prefill_tile in PREFILL_TILES:
        ways[str(prefill_tile)] = ((triton_prefill_attention, "_tile", partial(always, prefill_tile)),)
    return ways


WAYS = _ways()


def linear_cases() -> Iterator[Case]:
    for layer in LAYERS:
        for rows in (1, 4, 16, 64, 128, 256, 8192):
            if rows == 8192 and "lm_head" in layer.name:
                continue
            matrices = 2 if layer.kind == "gated" else 1
            weights = matrices * layer.outputs * layer.inputs
            moved = DTYPE.itemsize * (weights + rows * (layer.inputs + layer.outputs * (1 + (layer.kind == "add"))))
            few = [str(few) for few in FEW_ROWS if rows <= 4]
            tiles = [str(tile) for tile in TILES if 4 < rows <= 256 and _suits(tile, layer, rows)]
            yield Case(
                f"{layer.name} x {rows}",
                moved,
                2.0 * rows * weights,
                partial(linear_calls, layer, rows, DTYPE.itemsize * weights),
                (LIBRARY, *few, *tiles),
            )


def _suits(tile: Tile, layer: Layer, rows: int) -> bool:
    if tile.rows < min(rows, 64):
        return False
    gated = layer.kind == "gated"
    if (gated and tile.splits > 1) or layer.inputs % (tile.inputs * tile.splits):
        return False
    stage = (tile.rows + tile.outputs * (2 if gated else 1)) * tile.inputs * DTYPE.itemsize
    return stage * tile.stages <= 220_000 and not (tile.outputs < 64 and layer.outputs > 65_536)


def linear_calls(layer: Layer, rows: int, weight_bytes: int, most_sets: int) -> Calls:
    sets = min(sets_for(weight_bytes), most_sets)
    matrices = 2 if layer.kind == "gated" else 1
    weights = [randn(matrices * layer.outputs, layer.inputs).mul_(layer.inputs**-0.5) for _ in range(sets)]
    x, norm, hidden = randn(rows, layer.inputs), randn(layer.inputs), Hidden(randn(rows, layer.outputs))

    def call(weight: Tensor) -> Tensor:
        if layer.kind == "norm":
            return fastest_linear.norm_linear(Hidden(x), norm, 1e-6, weight, None)
        if layer.kind == "gated":
            return fastest_linear.norm_gated_linear(Hidden(x), norm, 1e-6, weight)
        return fastest_linear.add_linear(hidden, x, weight, None, None).states

    return [partial(call, weight) for weight in weights]


def decode_cases() -> Iterator[Case]:
    mixed = torch.randint(100, 2049, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths: list[tuple[Shape, str, list[int]]] = [
        (QWEN, "1 x 1024", [1024]),
        (QWEN, "1 x 16384", [16_384]),
        (QWEN, "8 x 1024", [1024] * 8),
        (QWEN, "64 x 1024", [1024] * 64),
        (QWEN, "64 x 100..2048", mixed[:64]),
        (QWEN, "256 x 100..2048", mixed),
        (QWEN, "256 x 1024", [1024] * 256),
        (LLAMA, "64 x 1024", [1024] * 64),
        (LLAMA, "64 x 512, 2 x 8192", [512] * 64 + [8192] * 2),
    ]
    ways = tuple(f"{tile}, {programs} a SM" for tile in DECODE_TILES for programs in PROGRAMS_PER_SM)
    for shape, case, each in lengths:
        moved = sum(each) * shape.token_bytes
        yield Case(f"{shape.name} decode {case}", moved, 0, partial(decode_calls, shape, each), ways)


def decode_calls(shape: Shape, lengths: list[int], most_sets: int) -> Calls:
    sets = min(sets_for(sum(lengths) * shape.token_bytes), most_sets)
    caches = Caches.scattered(shape, lengths, sets, BLOCK_SIZE, 32_768 // BLOCK_SIZE)
    qkv, rotation = new_tokens(shape, caches)
    scale = shape.head_dim**-0.5

    @cache
    def plan(_way: object) -> DecodeAttention:
        planned = triton_decode_attention.plan_decode(caches.tables, caches.lengths, caches.views[0][0])
        torch.cuda.synchronize()  # it may not be used by the launch right after it
        return planned

    def call(view: tuple[Tensor, Tensor]) -> Tensor:
        way = (triton_decode_attention._tile(shape.head_dim, DTYPE), triton_decode_attention._PROGRAMS_PER_SM)
        return triton_decode_attention.decode_attention(qkv, rotation, *view, plan(way), scale)

    return [partial(call, view) for view in caches.views]


def prefill_cases() -> Iterator[Case]:
    for shape in (QWEN, LLAMA):
        for case, query_lens, kv_lens in (
            ("8 x 1024", [1024] * 8, [1024] * 8),
            ("1 x 8192", [8192], [8192]),
            ("8 x 1024 after 3072", [1024] * 8, [4096] * 8),
        ):
            pairs = sum(query * (2 * kv - query + 1) // 2 for query, kv in zip(query_lens, kv_lens, strict=True))
            yield Case(
                f"{shape.name} prefill {case}",
                0,
                4 * pairs * shape.heads * shape.head_dim,
                partial(prefill_calls, shape, query_lens, kv_lens),
                tuple(map(str, PREFILL_TILES)),
            )


def prefill_calls(shape: Shape, query_lens: list[int], kv_lens: list[int], _most_sets: int) -> Calls:
    caches = Caches.scattered(shape, kv_lens, 1, BLOCK_SIZE)
    cu_query_lens = torch.tensor([0, *query_lens], device=DEVICE).cumsum(0).int()
    batch = PrefillAttention(tuple(query_lens), tuple(kv_lens), cu_query_lens, caches.lengths, caches.tables)
    tokens = sum(query_lens)
    qkv = randn(tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    q, k, v = torch.split(qkv, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    scale = shape.head_dim**-0.5
    return [partial(triton_prefill_attention.prefill_attention, q, k, v, *caches.views[0], batch, scale)]


PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    "linear": linear_cases,
    "decode": decode_cases,
    "prefill": prefill_cases,
}


def in_way(way: str, work: Callable[[], float]) -> float:
    """`work` with a way's replacements in place; infinity where the GPU cannot run it."""
    patches = [patch.object(module, name, value) for module, name, value in WAYS[way]]
    for each in patches:
        each.start()
    try:
        return work()
    except (RuntimeError, ValueError, AssertionError) as error:
        print(f"{way}: {str(error).splitlines()[0][:150]}")
        return float("inf")
    finally:
        for each in patches:
            each.stop()


def compile_case(part: str, index: int) -> None:
    case = list(PARTS[part]())[index]
    calls = case.calls(1)
    for way in (SERVED, *case.ways):
        in_way(way, lambda: float(calls[0]() is None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file for the figures")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")

    cases = [(part, index, case) for part in parts for index, case in enumerate(PARTS[part]())]
    compile_all([(part, index) for part, index, _ in cases])
    copy, gemm = copy_bytes_per_second(DEVICE), gemm_operations_per_second(DEVICE)
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.0f} GB/s, GEMM {gemm / 1e12:.0f} TFLOP/s")
    print(f"{'case':34} {'floor us':>9} {'served':>9} {'library':>9} {'best':>9}")
    results = {}
    for _, _, case in cases:
        floor = max(case.floor_bytes / copy, case.floor_operations / gemm) * 1e6
        calls = case.calls(32)
        times = {way: in_way(way, partial(graph_microseconds, calls)) for way in (SERVED, *case.ways)}
        results[case.name] = {"floor": floor, **times}
        best = min((way for way in case.ways if way != LIBRARY), key=times.__getitem__, default=LIBRARY)
        library = f"{times[LIBRARY]:9.1f}" if LIBRARY in times else f"{'':9}"
        print(f"{case.name:34} {floor:9.1f} {times[SERVED]:9.1f} {library} {times[best]:9.1f} {best}", flush=True)
        del calls
    arguments.out.write_text(json.dumps(results, indent=1))


def compile_all(items: Sequence[tuple[str, int]]) -> None:
    """Leaves every kernel in Triton's cache on disk."""
    workers = min(max(1, (os.cpu_count() or 1) - 2), 14)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(compile_case, *item) for item in items]:
            future.result()


if __name__ == "__main__":
    main()
