"""Goodput on two GPUs: one prefill and one decode worker, and the same where the decode worker helps out, against two
workers that do both, and against vLLM on each of them.

    python -m benchmarks.gpu.goodput --out goodput.json
    python -m benchmarks.gpu.goodput --layouts apart --layouts vllm --out goodput-vllm.json
    python -m benchmarks.gpu.goodput --prompt-tokens 200 --output-tokens 1000 --settle-seconds 10 --trials 4 \
        --low 8 --high 32 --out goodput-long.json

Goodput is the highest Poisson rate at which 90 % of the requests keep both limits, found by bisection. A prefill and a
decode worker can take no more prompts than one GPU can multiply for: that ceiling comes first.
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from cyclopts import App

from benchmarks.cluster import Cluster, Flags
from benchmarks.gpu import floors, models, vllm
from benchmarks.gpu.timing import gemm_operations_per_second
from benchmarks.load.bisection import Bisection
from benchmarks.load.config import Limits, LoadConfig
from benchmarks.load.processes import StartLoads, split, start
from benchmarks.load.summary import Distribution, Summary, summarize
from benchmarks.report import Figure, Report
from common.model.model_config import ModelConfig, load_config

GPUS = 2
ATTAINMENT = 0.9
RATIO = 1.5
MOST_CACHED = (
    0.02  # every prompt is new; but a full decode worker refuses some, whose second attempt finds the first's KV
)
WARMUP_REQUESTS = 64

LayoutName = Literal["apart", "helping", "both", "vllm"]

app = App(name="goodput", help_format="plaintext")


@dataclass(frozen=True, slots=True)
class Layout:
    """How the two GPUs are used. `serving` starts what serves on them, for the duration of a `with` block."""

    name: str
    settings: list[str]
    serving: AbstractContextManager[StartLoads]


def _cluster(name: str, router: Flags, workers: Sequence[tuple[str, Flags]], clients: int, logs: Path) -> Layout:
    overflow = ("prefill-overflow-tokens", "prefill-overflow-seconds")
    shown = (
        "device",
        "num-blocks",
        "max-batch",
        "max-batch-tokens",
        "prefill-chunk-tokens",
        "kv-cache-dtype",
        *overflow,
    )
    settings = [
        f"{module} " + ", ".join(f"{flag} {flags[flag]}" for flag in shown if flag in flags)
        for module, flags in workers
    ]
    return Layout(name, settings, _clients(Cluster(router, workers, logs), clients))


@contextmanager
def _clients(cluster: Cluster, count: int) -> Iterator[StartLoads]:
    with cluster, ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        yield partial(start, pool, cluster.target)


def _vllm(setup: vllm.Setup) -> Layout:
    tokens = setup.max_batch_tokens or "its own choice"
    settings = f"vLLM {vllm.version()}, max_num_seqs {setup.max_batch}, max_num_batched_tokens {tokens}"
    return Layout(f"{GPUS} of vLLM", [settings], vllm.engines(setup, range(GPUS)))


@dataclass(frozen=True, slots=True)
class Search:
    """The load, the limits, and where to look for the highest rate (requests a second, for all GPUs together)."""

    prompt_tokens: int
    output_tokens: int
    limits: Limits
    low: float
    high: float
    trials: int
    settle_seconds: float
    seconds: float
    clients: int

    def load(self, rate: float, trial: int) -> LoadConfig:
        """Requests of every trial come at the same times, but for the rate. That their common beginning, of less than a
        block, is of another length each time draws other prompts, so that none is in a cache."""
        return LoadConfig(
            rate=rate,
            duration=self.settle_seconds + self.seconds,
            warmup=0,
            prefix_tokens=1 + trial,
            prompt_tokens=str(self.prompt_tokens - 1 - trial),
            output_tokens=str(self.output_tokens),
        )

    @property
    def warmup(self) -> LoadConfig:
        return LoadConfig(
            concurrency=8,
            requests=-(-WARMUP_REQUESTS // self.clients),
            warmup=0,
            prompt_tokens=f"uniform:1,{self.prompt_tokens}",
            output_tokens="32",
            seed=1,
        )

    @property
    def timeout(self) -> float:
        """Seconds: twice as long as a request that keeps its limits may take, so that a trial far beyond what the
        cluster can do ends."""
        assert self.limits.ttft_limit is not None
        assert self.limits.tpot_limit is not None
        return 2 * (self.limits.ttft_limit + self.output_tokens * self.limits.tpot_limit) / 1000


@app.default
def main(
    *,
    out: Path | None = None,
    device: str = "cuda",
    name: str = "llama-3.1-8b",
    layouts: tuple[LayoutName, ...] = ("apart", "helping", "both"),
    prompt_tokens: int = 1750,
    output_tokens: int = 250,
    ttft_limit: float = 400.0,
    tpot_limit: float = 25.0,
    low: float = 8.0,
    high: float = 24.0,
    trials: int = 5,
    settle_seconds: float = 5.0,
    seconds: float = 20.0,
    clients: int = 4,
    prefill_blocks: int = 8192,
    decode_blocks: int = 26624,
    max_batch: int = 256,
    max_batch_tokens: int = 2048,
    prefill_chunk_tokens: int = 512,
    overflow_seconds: float = 0.0,
    kv_cache_dtype: Literal["auto", "fp8"] = "auto",
    vllm_batch_tokens: int | None = None,
    logs: Path | None = None,
) -> int:
    """Finds each layout's goodput, and the ratio of both.

    Parameters
    ----------
    out: JSON file for the figures.
    name: model, by its name in benchmarks/gpu/models.py.
    layouts: apart is one prefill and one decode worker, helping the same with a decode worker that prefills what the
        other has no time for, both is two workers that do both, vllm is vLLM on each GPU, in process.
    prompt_tokens: of every request.
    output_tokens: of every request.
    ttft_limit: milliseconds to the first token.
    tpot_limit: milliseconds a token after the first, a request's mean.
    low: requests a second, on both GPUs together, that are surely kept up with.
    high: requests a second that surely are not.
    trials: steps of the bisection.
    settle_seconds: before a trial counts requests.
    seconds: for which it counts them.
    clients: processes that the requests come from.
    prefill_blocks: KV blocks of the prefill worker.
    decode_blocks: of a decode worker, and of one that does both.
    max_batch: sequences decoded together, on either.
    max_batch_tokens: of the prefill worker's batch.
    prefill_chunk_tokens: of prompts that a worker which does both computes between two decode steps.
    overflow_seconds: that a request waits before the decode worker helps out with it.
    kv_cache_dtype: as our workers take it.
    vllm_batch_tokens: of a step of vLLM, prompts and answers together; not set: what vLLM takes for these GPUs.
    logs: folder for the clusters' logs; not set: one that is removed.
    """
    report = Report(out)
    limits = Limits(ttft_limit, tpot_limit)
    search = Search(prompt_tokens, output_tokens, limits, low, high, trials, settle_seconds, seconds, clients)
    first, second = ("cuda:0", "cuda:1") if device == "cuda" else (device, device)
    goodput: dict[LayoutName, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = models.write(name, Path(folder))
        longest = max(4096, prompt_tokens + output_tokens)
        worker = {**models.worker(model, device, longest), "kv-cache-dtype": kv_cache_dtype}
        prefill = {**worker, "num-blocks": prefill_blocks, "max-batch-tokens": max_batch_tokens}
        decode = {**worker, "num-blocks": decode_blocks, "max-batch": max_batch}
        helping = {
            **decode,
            "prefill-overflow-tokens": prompt_tokens,
            "prefill-overflow-seconds": overflow_seconds,
            "prefill-chunk-tokens": prefill_chunk_tokens,
        }
        both = {**decode, "prefill-tokens": 1, "prefill-chunk-tokens": prefill_chunk_tokens}
        if "apart" in layouts and device == "cuda":
            config = load_config(model, longest)
            report.section("ceiling", lambda: _ceiling(config, prompt_tokens, torch.device(first)))
        # Room for whole answers, so that no sequence is ever preempted.
        router: Flags = {"model": model, "headroom-tokens": output_tokens}

        def cluster(key: LayoutName, name: str, *workers: tuple[str, Flags]) -> Layout:
            return _cluster(name, router, workers, clients, (logs or Path(folder) / "logs") / key)

        known: dict[LayoutName, Callable[[], Layout]] = {
            "apart": lambda: cluster(
                "apart",
                "1 prefill + 1 decode",
                ("decode_worker", {**decode, "device": first}),
                ("prefill_worker", {**prefill, "device": second}),
            ),
            "helping": lambda: cluster(
                "helping",
                "1 prefill + 1 decode that helps out",
                ("decode_worker", {**helping, "device": first}),
                ("prefill_worker", {**prefill, "device": second}),
            ),
            "both": lambda: cluster(
                "both",
                "2 that do both",
                ("decode_worker", {**both, "device": first}),
                ("decode_worker", {**both, "device": second}),
            ),
            "vllm": lambda: _vllm(vllm.Setup(model, longest, max_batch, vllm_batch_tokens)),
        }
        for key in layouts:
            layout = known[key]()
            measure = partial(_goodput, layout, search, goodput, key)
            report.section(f"{name}, {layout.name}, {prompt_tokens} in, {output_tokens} out", measure)
    if len(goodput) > 1:
        report.section("ratio", lambda: _ratio(goodput, search))
    return report.finish()


def _ceiling(config: ModelConfig, prompt_tokens: int, device: torch.device) -> Iterator[Figure]:
    """The rate at which the pair's prefill GPU would do nothing but multiply, at the rate of a GEMM."""
    # in a process of its own, whose memory is free again when workers start
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        gemm = pool.submit(gemm_operations_per_second, device).result()
    most = gemm / floors.prefill_operations(config, [prompt_tokens]) / GPUS
    yield Figure("1 prefill + 1 decode: ceiling per GPU", f"{most:.2f} req/s", f"GEMM {gemm / 1e12:.0f} TFLOP/s")


def _goodput(layout: Layout, search: Search, goodput: dict[LayoutName, float], key: LayoutName) -> Iterator[Figure]:
    """Figures of every trial; puts the goodput for each GPU into `goodput[key]`."""
    for settings in layout.settings:
        yield Figure(layout.name, settings)
    began = time.perf_counter()
    with layout.serving as start_loads:
        yield Figure(f"{layout.name}: ready after", f"{time.perf_counter() - began:.0f} s")
        for warmed in start_loads([search.warmup] * search.clients, 120):
            warmed.result()
        bisection = Bisection(search.low, search.high)
        for trial in range(search.trials):
            rate = bisection.rate
            load = split(search.load(rate, trial), search.clients)
            records = [
                record
                for client in start_loads(load, search.timeout)
                for record in client.result()
                if record.due >= search.settle_seconds
            ]
            summary = summarize(records, search.limits)
            yield from _trial(layout, rate, summary, search)
            bisection.tell(summary.goodput_share >= ATTAINMENT)
    if bisection.best is None:
        yield Figure(f"{layout.name}: goodput", "none", f"below {bisection.high:g} req/s; lower --low")
        return
    goodput[key] = bisection.best / GPUS
    edge = "; or more: raise --high" if bisection.high == search.high else ""
    yield Figure(f"{layout.name}: goodput per GPU", f"{goodput[key]:.2f} req/s", f"{GPUS} GPUs{edge}")


def _trial(layout: Layout, rate: float, summary: Summary, search: Search) -> Iterator[Figure]:
    what = f"{layout.name}, {rate:.2f} req/s"
    cached = summary.prefill_cached_share + summary.decode_cached_share
    if cached > MOST_CACHED:
        raise RuntimeError(f"{what}: {cached:.1%} of the prompts' tokens were found in caches")
    offered = summary.requests / search.seconds
    failed = ", ".join(f"{number} {code}" for code, number in summary.errors.items())
    yield Figure(
        f"{what}: in limits", f"{summary.goodput_share:.1%}", f"{offered:.2f} req/s came{failed and '; ' + failed}"
    )
    yield Figure(f"{what}: TTFT p50, p90, p99", _percentiles(summary.ttft), f"limit {search.limits.ttft_limit:g} ms")
    yield Figure(f"{what}: TPOT p50, p90, p99", _percentiles(summary.tpot), f"limit {search.limits.tpot_limit:g} ms")


def _percentiles(distribution: Distribution | None) -> str:
    if distribution is None:
        return "none"
    return f"{distribution.p50:.1f}, {distribution.p90:.1f}, {distribution.p99:.1f} ms"


def _ratio(goodput: dict[LayoutName, float], search: Search) -> Iterator[Figure]:
    references: list[LayoutName] = ["both", "vllm"]
    for reference in filter(goodput.__contains__, references):
        for key in goodput.keys() - {reference, "vllm"}:
            wanted = (key, reference) == ("apart", "both") and search.prompt_tokens > search.output_tokens
            yield Figure(
                f"goodput per GPU, {key} / {reference}, {search.prompt_tokens} in, {search.output_tokens} out",
                f"{goodput[key]:.2f} req/s",
                f"{goodput[reference]:.2f} req/s",
                goodput[key] / goodput[reference],
                RATIO if wanted else None,
            )


if __name__ == "__main__":
    sys.exit(app())
