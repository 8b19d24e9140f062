"""Output tokens per second of nano-vLLM's benchmark workload on one GPU: the engine in one process, and over gRPC a
cluster with one worker that does both, and one with a prefill and a decode worker that share the GPU. First nano-vLLM
and vLLM, where they are installed.

    python -m benchmarks.gpu.throughput --out throughput.json
"""

import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from cyclopts import App

from benchmarks.cluster import Cluster, Flags
from benchmarks.gpu import floors, models, nano_vllm, vllm
from benchmarks.gpu.timing import copy_bytes_per_second, gemm_operations_per_second
from benchmarks.gpu.workload import MAX_LENGTH, TEMPERATURE, WARM_UP, Ask, ask_all, does_both, split, workload
from benchmarks.report import Figure, Report
from common.model.model_config import load_config
from twostroke import AsyncClient, event_loop

# Tokens per second of the workload at 3.0 TB/s and 790 TFLOP/s, and the share of it that is wanted.
FLOOR, FLOOR_SHARE = 25_800, 0.8
CLUSTER_SHARE = 0.97
HANDOVER_LIMIT_MS = 3.0
IN_PROCESS, NANO_VLLM, VLLM = "in process", "nano-vLLM in process", "vLLM in process"

app = App(name="throughput", help_format="plaintext")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How the workers are set up; equal in process and in the cluster."""

    prefill_blocks: int
    decode_blocks: int
    max_batch: int
    max_batch_tokens: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Workers that share a GPU. `bounded`: they serve this workload best, so what is wanted is wanted of them."""

    name: str
    workers: Sequence[tuple[str, Flags]]
    rounds: int
    bounded: bool

    @property
    def hands_over(self) -> bool:
        return len(self.workers) > 1


def _one_worker(worker: Flags, sizes: Sizes) -> Layout:
    both = does_both(worker, sizes.decode_blocks, sizes.max_batch, sizes.max_batch_tokens)
    return Layout("one worker", [("decode_worker", both)], rounds=2, bounded=True)


def _pair(worker: Flags, sizes: Sizes) -> Layout:
    prefill = {"num-blocks": sizes.prefill_blocks, "max-batch-tokens": sizes.max_batch_tokens}
    decode = {"num-blocks": sizes.decode_blocks, "max-batch": sizes.max_batch}
    workers = [("prefill_worker", {**worker, **prefill}), ("decode_worker", {**worker, **decode})]
    return Layout("pair", workers, rounds=1, bounded=False)


@app.default
def main(
    *,
    out: Path | None = None,
    device: str = "cuda",
    name: str = "qwen3-0.6b",
    requests: int = 256,
    longest: int = 1024,
    prefill_blocks: int = 6144,
    decode_blocks: int = 20480,
    max_batch: int = 256,
    max_batch_tokens: int = 8192,
    clients: int = 4,
    logs: Path | None = None,
    skip: tuple[str, ...] = (),
) -> int:
    """Measures the workload in process and through a cluster.

    Parameters
    ----------
    out: JSON file for the figures.
    name: model, by its name in benchmarks/gpu/models.py.
    longest: of prompts and of outputs, in tokens.
    clients: processes that the cluster's requests come from.
    logs: folder for the cluster's logs; not set: one that is removed.
    skip: "nano-vllm", "vllm", "process" or "cluster".
    """
    report = Report(out)
    asks = workload(requests, longest)
    sizes = Sizes(prefill_blocks, decode_blocks, max_batch, max_batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        directory = models.write(name, Path(folder))
        references: dict[str, float] = {}
        if "nano-vllm" not in skip and nano_vllm.installed():
            nano = partial(nano_vllm.seconds_of, directory, MAX_LENGTH)
            report.section("nano-vLLM", lambda: _reference(NANO_VLLM, nano, asks, references))
        if "vllm" not in skip and vllm.installed():
            other = partial(vllm.seconds_of, vllm.Setup(directory, MAX_LENGTH, max_batch))
            report.section("vLLM", lambda: _reference(VLLM, other, asks, references))
        if "process" not in skip:
            report.section("in process", lambda: _apart(directory, device, asks, sizes, references))
        if "cluster" not in skip:
            worker = {**models.worker(directory, device, MAX_LENGTH), "device": device}
            where = logs or Path(folder) / "logs"
            for layout in (_one_worker(worker, sizes), _pair(worker, sizes)):
                cluster = partial(_in_cluster, layout, directory, asks, clients, references, where / layout.name)
                report.section(layout.name, cluster)
    return report.finish()


# ------------------------------------------------------------ in one process


def _reference(
    name: str, seconds_of: Callable[[list[Ask], float], list[float]], asks: list[Ask], references: dict[str, float]
) -> Iterator[Figure]:
    """Figures of another engine, each run; puts the better one's rate into `references[name]`."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        runs = pool.submit(seconds_of, asks, TEMPERATURE).result()
    tokens = sum(ask.output_tokens for ask in asks)
    references[name] = tokens / min(runs)
    for seconds in runs:
        yield _against_floor(name, tokens, seconds, bounded=False)


def _apart(
    directory: Path, device: str, asks: list[Ask], sizes: Sizes, references: dict[str, float]
) -> Iterator[Figure]:
    """In a process of its own, whose memory is free again for the cluster."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        floor, runs = pool.submit(_run_in_process, directory, device, asks, sizes).result()
    tokens = sum(ask.output_tokens for ask in asks)
    references[IN_PROCESS] = tokens / min(runs)
    yield Figure("floor of this GPU", f"{tokens / floor:.0f} tok/s", f"{floor:.2f} s for {tokens} tokens")
    for seconds in runs:
        yield _against_floor("in process", tokens, seconds, bounded=False)


def _run_in_process(directory: Path, device: str, asks: list[Ask], sizes: Sizes) -> tuple[float, list[float]]:
    from benchmarks.in_process import InProcess, spec
    from benchmarks.parts import load_model, worker_parts

    where = torch.device(device)
    small = where.type == "cpu"
    copy = copy_bytes_per_second(where, 1 << 24 if small else 2 << 30)
    gemm = gemm_operations_per_second(where, 256 if small else 8192)
    config = load_config(directory, MAX_LENGTH)
    floor = floors.workload_seconds(config, [(len(ask.prompt), ask.output_tokens) for ask in asks], copy, gemm)
    loaded = load_model(directory, models.dtype(device), where, dummy=True, max_length=MAX_LENGTH)
    engine = InProcess(
        worker_parts(loaded, sizes.prefill_blocks),
        worker_parts(loaded, sizes.decode_blocks),
        max_batch=sizes.max_batch,
        max_batch_tokens=sizes.max_batch_tokens,
    )
    runs = []
    for run in range(3):  # the first is the warm-up, with a few requests
        some = asks[:: WARM_UP if run == 0 else 1]
        specs = [
            spec(
                ask.prompt,
                len(ask.prompt) + ask.output_tokens,
                temperature=TEMPERATURE,
                seed=index,
                root=run.to_bytes(16, "little"),
            )
            for index, ask in enumerate(some)
        ]
        started = time.perf_counter()
        outputs = engine.run(specs)
        seconds = time.perf_counter() - started
        assert [len(output) for output in outputs] == [ask.output_tokens for ask in some]
        assert engine.blocks_home()
        if run > 0:
            runs.append(seconds)
    return floor, runs


# ------------------------------------------------------------ through a cluster


def _in_cluster(
    layout: Layout, directory: Path, asks: list[Ask], clients: int, references: dict[str, float], logs: Path
) -> Iterator[Figure]:
    started = time.perf_counter()
    with (
        Cluster({"model": directory, "headroom-tokens": MAX_LENGTH}, layout.workers, logs) as cluster,
        ProcessPoolExecutor(clients, multiprocessing.get_context("spawn")) as pool,
    ):
        yield Figure(f"{layout.name}: ready after", f"{time.perf_counter() - started:.1f} s")
        shares = split(asks, clients)
        tokens = sum(ask.output_tokens for ask in asks)
        ask_all(pool, cluster.target, [share[:4] for share in shares], "warm-up", stream=True)
        if layout.hands_over:
            yield from _idle_handover(cluster.target)
        for round_ in range(layout.rounds):
            for kind in ("Generate", "GenerateStream"):
                what = f"{layout.name}, {kind}"
                salt = f"{kind} {round_}"
                seconds = ask_all(pool, cluster.target, shares, salt, stream=kind == "GenerateStream")
                yield _against_floor(what, tokens, seconds, bounded=layout.bounded)
                for name, reference in references.items():
                    share = CLUSTER_SHARE if layout.bounded and name == IN_PROCESS else None
                    rate = tokens / seconds
                    yield Figure(what, f"{rate:.0f} tok/s", f"{reference:.0f} tok/s {name}", rate / reference, share)


def _idle_handover(target: str) -> Iterator[Figure]:
    """From the first token at the client to the second, less the time between later ones: what the hand-over costs."""
    samples = event_loop.run(_handovers(target, 1024, 20))
    gaps, transfers = zip(*samples, strict=True)
    gap, transfer = statistics.median(gaps), statistics.median(transfers)
    yield Figure(
        "prefill done to first decode step, 1,024 tokens, idle",
        f"{gap:.2f} ms (max {max(gaps):.2f})",
        f"limit {HANDOVER_LIMIT_MS:g} ms",
        gap / HANDOVER_LIMIT_MS,
        1.0,
        at_most=True,
    )
    yield Figure("pull asked for to pull done, as the worker says", f"{transfer:.2f} ms (max {max(transfers):.2f})")


async def _handovers(target: str, length: int, count: int) -> list[tuple[float, float]]:
    draw = random.Random(1)
    samples = []
    async with AsyncClient(target, timeout=60) as client:
        for index in range(count + 2):
            prompt = draw.choices(range(10_000), k=length)
            arrivals, transfer = [], 0.0
            async for piece in client.stream(prompt, max_tokens=32, temperature=TEMPERATURE, ignore_eos=True):
                if piece.token_ids:
                    arrivals.append(time.perf_counter())
                if piece.finish is not None:
                    transfer = piece.finish.timing.transfer_ms
            between = [1000 * (later - sooner) for sooner, later in pairwise(arrivals)]
            if index >= 2:
                samples.append((between[0] - statistics.median(between[1:]), transfer))
    return samples


def _against_floor(what: str, tokens: int, seconds: float, *, bounded: bool) -> Figure:
    rate = tokens / seconds
    return Figure(
        what,
        f"{rate:.0f} tok/s {seconds:.2f} s",
        f"floor {FLOOR} tok/s",
        rate / FLOOR,
        FLOOR_SHARE if bounded else None,
    )


if __name__ == "__main__":
    sys.exit(app())
