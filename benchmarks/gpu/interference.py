"""What a stream of long prompts does to the time between tokens of answers that are being decoded: each worker on a GPU
of its own, or both on the only one.

    python -m benchmarks.gpu.interference --out interference.json
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from cyclopts import App

from benchmarks.cluster import Cluster
from benchmarks.gpu import models
from benchmarks.load.config import Limits, LoadConfig
from benchmarks.load.processes import start
from benchmarks.load.record import Record
from benchmarks.load.summary import Summary, summarize
from benchmarks.report import Figure, Report

LIMIT = 1.1
TIMEOUT = 300.0
LEAD_SECONDS = 4.0  # for the long prompts to fill the prefill worker's queue, before anything counts

app = App(name="interference", help_format="plaintext")


@app.default
def main(
    *,
    out: Path | None = None,
    device: str = "cuda",
    name: str = "llama-3.1-8b",
    streams: int = 64,
    prompt_tokens: str = "256",
    output_tokens: str = "512",
    long_prompt_tokens: int = 8192,
    long_output_tokens: int = 8,
    long_concurrency: int = 6,
    seconds: float = 20.0,
    prefill_blocks: int = 6144,
    decode_blocks: int = 12288,
    logs: Path | None = None,
) -> int:
    """Measures the time between tokens with and without long prompts beside.

    Parameters
    ----------
    out: JSON file for the figures.
    name: model, by its name in benchmarks/gpu/models.py.
    streams: answers that are decoded at once.
    prompt_tokens: of those, as for `twostroke bench`.
    output_tokens: of those.
    long_prompt_tokens: of a prompt beside.
    long_output_tokens: of its answer: more than one, so that its KV is handed over.
    long_concurrency: long prompts under way at once: enough of them that the prefill worker is never idle.
    seconds: length of each measurement.
    logs: folder for the cluster's logs; not set: one that is removed.
    """
    report = Report(out)
    apart = device == "cuda" and torch.cuda.device_count() > 1
    decode_device, prefill_device = ("cuda:0", "cuda:1") if apart else (device, device)
    steady = LoadConfig(concurrency=streams, duration=seconds, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    beside = LoadConfig(
        concurrency=long_concurrency,
        duration=3 * LEAD_SECONDS + seconds,
        warmup=0,
        prompt_tokens=str(long_prompt_tokens),
        output_tokens=str(long_output_tokens),
        seed=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = models.write(name, Path(folder))
        worker = models.worker(model, device, long_prompt_tokens + 2048)
        prefill = {**worker, "device": prefill_device, "num-blocks": prefill_blocks}
        decode = {**worker, "device": decode_device, "num-blocks": decode_blocks, "max-batch": 2 * streams}
        cluster = Cluster(
            {"model": model, "headroom-tokens": 1024},
            [("prefill_worker", prefill), ("decode_worker", decode)],
            logs or Path(folder) / "logs",
        )
        where = f"{decode_device}, {prefill_device}"
        report.section(f"{name}, {streams} streams, {where}", lambda: _measure(cluster, steady, beside, where, apart))
    return report.finish()


def _measure(cluster: Cluster, steady: LoadConfig, beside: LoadConfig, where: str, apart: bool) -> Iterator[Figure]:
    with cluster, ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        alone = _summary(_start(pool, cluster, steady))
        yield _itl("alone", alone)
        long = _start(pool, cluster, beside)
        time.sleep(LEAD_SECONDS)
        both = _summary(_start(pool, cluster, replace(steady, seed=2)))
        yield _itl("beside", both)
        prompts = _summary(long)
    yield Figure("long prompts", f"{prompts.prompt_tokens_per_second:.0f} tok/s", f"{prompts.requests} of them")
    for percentile in ("p50", "p99"):
        itl, floor = getattr(both.itl, percentile), getattr(alone.itl, percentile)
        bound = LIMIT if apart and percentile == "p99" else None
        yield Figure(f"ITL {percentile}, beside / alone", f"{itl:.2f} ms", where, itl / floor, bound, at_most=True)


def _start(pool: ProcessPoolExecutor, cluster: Cluster, config: LoadConfig) -> Future[list[Record]]:
    (client,) = start(pool, cluster.target, [config], TIMEOUT)
    return client


def _summary(client: Future[list[Record]]) -> Summary:
    summary = summarize(client.result(), Limits())
    if summary.errors:
        raise RuntimeError(f"requests failed: {summary.errors}")
    return summary


def _itl(what: str, summary: Summary) -> Figure:
    itl = summary.itl
    assert itl is not None
    measured = f"{itl.p50:.2f}, {itl.p90:.2f}, {itl.p99:.2f} ms"
    return Figure(f"ITL p50, p90, p99, {what}", measured, f"{summary.output_tokens_per_second:.0f} tok/s")


if __name__ == "__main__":
    sys.exit(app())
