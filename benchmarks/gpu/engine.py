"""The engine on one GPU beside what the hardware could do: decode steps, the GPU's idle time between them, prefill,
CUDA graphs. Everything is held against figures of the same run.

    python -m benchmarks.gpu.engine --out engine.json
"""

import gc
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from cyclopts import App

from benchmarks.gpu import floors, models
from benchmarks.gpu.timing import copy_bytes_per_second, elapsed, gemm_operations_per_second, median, synchronize
from benchmarks.in_process import spec
from benchmarks.parts import LoadedModel, load_model, worker_parts
from benchmarks.report import Figure, Report
from common.device.devices import choose_kv_dtype
from common.model.dtypes import torch_dtype
from common.worker.worker_parts import WorkerParts
from decode_worker.engine import STEP_POLL_SECONDS
from decode_worker.loop import DecodeLoop
from decode_worker.runner import Runner as DecodeRunner
from decode_worker.scheduler import Sequence
from prefill_worker.runner import Runner as PrefillRunner
from prefill_worker.scheduler import Chunk, Prompt

# How many times its floor a step may take, by batch size.
STEP_BOUNDS = {1: 1.6, 64: 1.2, 256: 1.15}
IDLE_BATCHES = (64, 256)
IDLE_BOUND = 0.01
PREFILL_BOUNDS = {"llama-3.1-8b": 0.75, "qwen3-0.6b": 0.55}
MEMORY_KEPT_FREE = 6 << 30  # for activations, graphs and logits
WARM_UP, ROUNDS, STEPS = 5, 3, 40  # turns of the loop

app = App(name="engine", help_format="plaintext")


@dataclass(frozen=True, slots=True)
class Hardware:
    device: torch.device
    copy: float  # bytes per second, read plus written
    gemm: float  # operations per second


@app.default
def main(
    *,
    out: Path | None = None,
    device: str = "cuda",
    names: tuple[str, ...] = ("qwen3-0.6b", "llama-3.1-8b"),
    batches: tuple[int, ...] = (1, 64, 256),
    context: int = 1024,
    prefill_tokens: int = 8192,
    hardware_size: int = 8192,
    kv_cache_dtype: Literal["auto", "fp8"] = "auto",
    dependent_launch: bool = True,
) -> int:
    """Measures the engine; the sizes are smaller only to try this script without a GPU.

    Parameters
    ----------
    out: JSON file for the figures.
    names: models, by the names in benchmarks/gpu/models.py.
    hardware_size: rows of the matrices, and MiB / 4 of the copy, that the hardware's own rates are measured with.
    kv_cache_dtype: as workers take it.
    dependent_launch: off to see what programmatic dependent launch of the Triton kernels brings.
    """
    if not dependent_launch:
        from kernels.cuda import triton_launch  # imports Triton, which a machine without a GPU may lack

        triton_launch.enabled = False
    report = Report(out)
    where = torch.device(device)
    rates: list[Hardware] = []

    def measure_hardware() -> Iterator[Figure]:
        copy = copy_bytes_per_second(where, hardware_size << 18)
        gemm = gemm_operations_per_second(where, hardware_size)
        rates.append(Hardware(where, copy, gemm))
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
        yield Figure(f"copy ({name}, torch {torch.__version__})", f"{copy / 1e9:.0f} GB/s")
        yield Figure(f"GEMM {hardware_size}³ bfloat16", f"{gemm / 1e12:.0f} TFLOP/s")

    report.section("hardware", measure_hardware)
    if not rates:
        return report.finish()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            directory = models.write(name, Path(folder))
            _measure_model(report, rates[0], name, directory, batches, context, prefill_tokens, kv_cache_dtype)
    return report.finish()


def _measure_model(
    report: Report,
    hardware: Hardware,
    name: str,
    directory: Path,
    batches: tuple[int, ...],
    context: int,
    prefill_tokens: int,
    kv_cache_dtype: str,
) -> None:
    loaded: list[LoadedModel] = []

    def load() -> Iterator[Figure]:
        started = time.perf_counter()
        max_length = max(4096, prefill_tokens + 1)
        loaded.append(load_model(directory, "bfloat16", hardware.device, dummy=True, max_length=max_length))
        synchronize(hardware.device)
        yield Figure(f"{name}: weights made", f"{time.perf_counter() - started:.2f} s")

    report.section(f"{name}: load", load)
    if not loaded:
        return
    report.section(f"{name}: prefill", lambda: _prefill(hardware, name, loaded[0], prefill_tokens, kv_cache_dtype))
    _free(hardware.device)
    report.section(f"{name}: decode", lambda: _decode(hardware, name, loaded[0], batches, context, kv_cache_dtype))
    loaded.clear()
    _free(hardware.device)


def _prefill(hardware: Hardware, name: str, loaded: LoadedModel, tokens: int, kv_cache_dtype: str) -> Iterator[Figure]:
    """Batches launched one after another, as the worker's loop does."""
    parts = worker_parts(loaded, num_blocks=8 * -(-tokens // 16), kv_cache_dtype=kv_cache_dtype)
    runner = PrefillRunner(parts)
    runner.capture(tokens)
    for count in (8, 1):
        chunks = [_whole_prompt(parts, index, tokens // count) for index in range(count)]
        batches = 4

        def run(chunks: list[Chunk] = chunks, batches: int = batches) -> None:
            for _ in range(batches):
                runner.launch(chunks)

        seconds = median(hardware.device, run, 3) / batches
        rate = floors.prefill_operations(loaded.model.config, [tokens // count] * count) / seconds
        yield Figure(
            f"{name}: prefill {count} × {tokens // count}",
            f"{1000 * seconds:.2f} ms {tokens / seconds / 1000:.0f}k tok/s",
            f"{rate / 1e12:.0f} TFLOP/s / GEMM",
            rate / hardware.gemm,
            PREFILL_BOUNDS.get(name),
        )
    for length, cached in ((128, 0), (512, 0), (1024, 0), (64, tokens - 64), (512, tokens - 512)):
        if cached >= 0 and length + cached <= tokens:
            yield _one_prompt(hardware, name, runner, _whole_prompt(parts, length, length + cached, cached))


def _one_prompt(hardware: Hardware, name: str, runner: PrefillRunner, chunk: Chunk) -> Figure:
    """From nothing under way to the first token, beside the same with operations launched one after another."""

    def first_token() -> None:
        runner.launch([chunk]).first_tokens()

    captured = median(hardware.device, first_token, 5)
    graphs, runner.graphs = runner.graphs, None
    one_by_one = median(hardware.device, first_token, 5)
    runner.graphs = graphs
    return Figure(
        f"{name}: one prompt of {chunk.end - chunk.start}" + (f" after {chunk.start} cached" if chunk.start else ""),
        f"{1000 * captured:.2f} ms",
        f"{1000 * one_by_one:.2f} ms launched one by one",
        captured / one_by_one,
        at_most=True,
    )


def _whole_prompt(parts: WorkerParts, index: int, length: int, cached: int = 0) -> Chunk:
    tokens = random.Random(index).choices(range(10_000), k=length)
    blocks = parts.blocks.allocate(-(-length // parts.pool.layout.block_size))
    return Chunk(Prompt(index, 0, spec(tokens, length + 1, temperature=0.6), blocks), cached, length)


def _decode(
    hardware: Hardware, name: str, loaded: LoadedModel, batches: tuple[int, ...], context: int, kv_cache_dtype: str
) -> Iterator[Figure]:
    device, config = hardware.device, loaded.model.config
    blocks_each = -(-(context + ROUNDS * STEPS + WARM_UP) // 16) + 1
    wanted = max(batches) * blocks_each
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] - MEMORY_KEPT_FREE
        value_bytes = torch_dtype(choose_kv_dtype(kv_cache_dtype, loaded.model.dtype, device)).itemsize
        wanted = min(wanted, room // (16 * floors.kv_bytes(config, value_bytes)))
    parts = worker_parts(loaded, wanted, kv_cache_dtype=kv_cache_dtype)
    before = _memory_in_use(device)
    started = time.perf_counter()
    runner = DecodeRunner(parts, max(batches))
    synchronize(device)
    seconds = time.perf_counter() - started
    memory = (_memory_in_use(device) - before) / 2**20
    yield Figure(f"{name}: CUDA graphs up to batch {max(batches)}", f"{seconds:.1f} s {memory:.0f} MiB")
    for batch in batches:
        if batch * blocks_each > parts.blocks.available:
            yield Figure(f"{name}: decode {batch} × {context}", "does not fit")
            continue
        yield from _decode_batch(hardware, name, parts, runner, batch, context)


def _decode_batch(
    hardware: Hardware, name: str, parts: WorkerParts, runner: DecodeRunner, batch: int, context: int
) -> Iterator[Figure]:
    """The loop with its look-ahead, and the same steps again as bare replays; the difference is the GPU waiting."""
    device, config = hardware.device, parts.model.config
    loop = DecodeLoop(parts, runner, batch)
    first_length = max(context - (ROUNDS * STEPS) // 2 - WARM_UP, 16)
    sequences = [_sequence(index, first_length) for index in range(batch)]
    for sequence in sequences:
        assert loop.scheduler.reserve(sequence, 0)
        sequence.tokens.append(1)
        loop.start(sequence)
    for _ in range(WARM_UP):
        loop.turn()
    in_loop, replayed = [], []
    for _ in range(ROUNDS):
        loop.turn()  # the GPU is busy when the measurement begins
        in_loop.append(elapsed(device, partial(_repeat, partial(_turn, loop)), idle=False) / STEPS)
        with torch.inference_mode():
            runner.batch.state.lengths[:batch] -= STEPS
        replayed.append(elapsed(device, partial(_repeat, partial(_step, runner, batch)), idle=False) / STEPS)
    mean_context = first_length + WARM_UP + ROUNDS * (STEPS + 1) // 2 + 1
    loop_seconds, step_seconds = sorted(in_loop)[ROUNDS // 2], sorted(replayed)[ROUNDS // 2]
    value_bytes = parts.pool.tensor.element_size()
    floor = floors.decode_step_bytes(config, [mean_context] * batch, value_bytes) / hardware.copy
    yield Figure(
        f"{name}: decode step {batch} × {context}",
        f"{1000 * step_seconds:.3f} ms",
        f"floor {1000 * floor:.3f} ms",
        step_seconds / floor,
        STEP_BOUNDS.get(batch),
        at_most=True,
    )
    yield Figure(
        f"{name}: GPU idle between steps, batch {batch}",
        f"{1000 * loop_seconds:.3f} ms a turn",
        f"replay {1000 * step_seconds:.3f} ms",
        1 - step_seconds / loop_seconds,
        IDLE_BOUND if batch in IDLE_BATCHES else None,
        at_most=True,
    )
    for sequence in sequences:
        loop.drop(sequence)
    while loop.busy:
        loop.turn()
    assert parts.blocks.in_use_count == 0


def _sequence(index: int, length: int) -> Sequence:
    tokens = random.Random(index).choices(range(10_000), k=length)
    wanted = spec(tokens, length + ROUNDS * (STEPS + 1) + WARM_UP + 8, temperature=0.6, seed=index)
    return Sequence(index, 0, wanted, tokens)


def _turn(loop: DecodeLoop) -> None:
    """As the decode worker does it: the next step is launched when the one that runs is about to end."""
    while spare := loop.spare_seconds():
        time.sleep(min(spare, STEP_POLL_SECONDS))
    loop.turn()


def _step(runner: DecodeRunner, rows: int) -> None:
    if runner.graphs is not None:
        runner.graphs.plain(rows)
    else:
        runner.launch(None)


def _repeat(step: Callable[[], object]) -> None:
    for _ in range(STEPS):
        step()


def _memory_in_use(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(app())
