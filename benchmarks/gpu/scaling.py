"""Output tokens per second of nano-vLLM's benchmark workload on one, two, four GPUs and so on, with a worker that does
both on each: behind one router, and all of them behind two. Then as pairs of prefill and decode workers.

    python -m benchmarks.gpu.scaling --out scaling.json

Each GPU adds as many requests as the first has.
"""

import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from cyclopts import App

from benchmarks.cluster import Cluster, Flags
from benchmarks.gpu import models
from benchmarks.gpu.workload import MAX_LENGTH, Ask, ask_all, does_both, split, workload
from benchmarks.report import Figure, Report

ROUNDS = 2

app = App(name="scaling", help_format="plaintext")


@dataclass(frozen=True, slots=True)
class Layout:
    name: str
    gpus: int
    routers: int
    workers: tuple[tuple[str, Flags], ...]


@app.default
def main(
    *,
    out: Path | None = None,
    device: str = "cuda",
    gpus: int | None = None,
    name: str = "qwen3-0.6b",
    requests: int = 256,
    longest: int = 1024,
    blocks: int = 20480,
    max_batch: int = 256,
    max_batch_tokens: int = 8192,
    clients: int = 4,
    logs: Path | None = None,
) -> int:
    """Measures the workload on ever more GPUs.

    Parameters
    ----------
    out: JSON file for the figures.
    gpus: most GPUs; not set: all of this machine.
    name: model, by its name in benchmarks/gpu/models.py.
    requests: for each GPU.
    longest: of prompts and of outputs, in tokens.
    blocks: KV blocks of each worker.
    clients: processes that requests come from, for each GPU.
    logs: folder for the clusters' logs; not set: one that is removed.
    """
    report = Report(out)
    most = gpus or torch.cuda.device_count()
    devices = [f"{device}:{index}" if device == "cuda" else device for index in range(most)]
    alone: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        model = models.write(name, Path(folder))
        worker = {**models.worker(model, device, MAX_LENGTH), "num-blocks": blocks}
        both = does_both(worker, blocks, max_batch, max_batch_tokens)
        prefill, decode = {**worker, "max-batch-tokens": max_batch_tokens}, {**worker, "max-batch": max_batch}
        for layout in _layouts(devices, both, prefill, decode):
            where = (logs or Path(folder) / "logs") / layout.name.replace(",", "").replace(" ", "-")
            router: Flags = {"model": model, "headroom-tokens": MAX_LENGTH}
            cluster = Cluster(router, layout.workers, where, layout.routers)
            asks = workload(requests * layout.gpus, longest)
            report.section(layout.name, partial(_measure, layout, cluster, asks, clients * layout.gpus, alone))
    return report.finish()


def _layouts(devices: list[str], both: Flags, prefill: Flags, decode: Flags) -> Iterator[Layout]:
    def that_do_both(count: int) -> tuple[tuple[str, Flags], ...]:
        return tuple(("decode_worker", {**both, "device": device}) for device in devices[:count])

    most = len(devices)
    count = 1
    while count <= most:
        yield Layout(f"{count} GPU{'s' * (count > 1)}", count, 1, that_do_both(count))
        count *= 2
    if most > 1:
        yield Layout(f"{most} GPUs, 2 routers", most, 2, that_do_both(most))
        pairs = zip(devices[::2], devices[1::2], strict=False)
        workers = tuple(
            part
            for first, second in pairs
            for part in (
                ("prefill_worker", {**prefill, "device": first}),
                ("decode_worker", {**decode, "device": second}),
            )
        )
        yield Layout(f"{len(workers)} GPUs, pairs", len(workers), 1, workers)


def _measure(layout: Layout, cluster: Cluster, asks: list[Ask], clients: int, alone: list[float]) -> Iterator[Figure]:
    """Figures of each round; adds the rates of a single GPU to `alone`."""
    shares = split(asks, clients)
    tokens = sum(ask.output_tokens for ask in asks)
    with cluster, ProcessPoolExecutor(clients, multiprocessing.get_context("spawn")) as pool:
        ask_all(pool, cluster.target, [share[:4] for share in shares], "warm-up", stream=True)
        for round_ in range(ROUNDS):
            cpu_before = cluster.cpu_seconds("router")
            seconds = ask_all(pool, cluster.target, shares, str(round_), stream=True)
            cpu, rate = cluster.cpu_seconds("router") - cpu_before, tokens / seconds
            if layout.gpus == 1:
                alone.append(rate)
            reference = layout.gpus * max(alone)
            yield Figure(
                layout.name, f"{rate:.0f} tok/s {seconds:.2f} s", f"{reference:.0f} tok/s alone", rate / reference
            )
            yield Figure(f"{layout.name}: CPU of the routers", f"{cpu / seconds:.2f} cores")


if __name__ == "__main__":
    sys.exit(app())
