"""What KV in host memory saves: questions about documents of which the pool holds a part, answered with and without
`--host-cache-gib`, and with a pool that holds them all; and how fast blocks go there and back.

    python -m benchmarks.gpu.host_cache --out host_cache.json

One worker does both, prefill and decode. Questions come in a closed loop, each about a document drawn at random.
"""

import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from cyclopts import App

from benchmarks.cluster import Cluster, Flags
from benchmarks.gpu import models
from benchmarks.gpu.timing import launched
from benchmarks.load.config import Limits, LoadConfig
from benchmarks.load.processes import run_load
from benchmarks.load.summary import Distribution, Summary, summarize
from benchmarks.report import Figure, Report
from common.kv.kv_pool import KvLayout, allocate

TIMEOUT = 120.0
# Of Llama-3.1-8B in bfloat16: 8,192 tokens, out of twice as many.
LAYOUT = KvLayout(1024, 32, 16, 8, 128, "bfloat16")
MOVED = 512  # blocks
REPEATS = 7
AT_LEAST = 0.9  # of one copy of as many bytes

app = App(name="host_cache", help_format="plaintext")


@app.default
def main(
    *,
    out: Path | None = None,
    device: str = "cuda",
    name: str = "llama-3.1-8b",
    documents: int = 32,
    document_tokens: int = 8192,
    question_tokens: int = 64,
    output_tokens: int = 64,
    concurrency: int = 4,
    requests: int = 128,
    pool_blocks: int = 8192,
    host_gib: float = 40.0,
    chunk_tokens: int = 2048,
    logs: Path | None = None,
) -> int:
    """Measures the three, one after the other.

    Parameters
    ----------
    out: JSON file for the figures.
    name: model, by its name in benchmarks/gpu/models.py.
    documents: that are asked about.
    document_tokens: of each.
    question_tokens: that follow a document.
    output_tokens: of an answer.
    concurrency: questions under way at any time.
    requests: that are measured, after four for each document.
    pool_blocks: of the worker's pool; it holds all documents in the third run.
    host_gib: of the host's memory.
    chunk_tokens: of prompts, between two decode steps.
    logs: folder for the clusters' logs; not set: one that is removed.
    """
    report = Report(out)
    if device == "cuda":
        report.section(f"{MOVED} scattered blocks of {LAYOUT.block_bytes >> 20} MiB", _copies)
    load = LoadConfig(
        concurrency=concurrency,
        requests=requests,
        warmup=4 * documents,
        prefixes=documents,
        prefix_tokens=document_tokens,
        prompt_tokens=str(question_tokens),
        output_tokens=str(output_tokens),
    )
    length = document_tokens + question_tokens + output_tokens
    with tempfile.TemporaryDirectory() as folder:
        model = models.write(name, Path(folder))
        worker = {
            **models.worker(model, device, length),
            "device": device,
            "prefill-tokens": 1,
            "prefill-chunk-tokens": chunk_tokens,
        }

        def serve(key: str, **flags: object) -> Summary:
            workers: list[tuple[str, Flags]] = [("decode_worker", {**worker, **flags})]
            with Cluster({"model": model}, workers, (logs or Path(folder) / "logs") / key) as cluster:
                records = run_load(cluster.target, load, TIMEOUT)
            summary = summarize(records, Limits())
            if summary.errors:
                raise RuntimeError(f"requests failed: {summary.errors}")
            return summary

        def measure() -> Iterator[Figure]:
            enough = documents * -(-length // 16) + 4 * pool_blocks // 16
            small = {"num-blocks": pool_blocks}
            summaries = {
                "pool alone": serve("pool", **small),
                "with host memory": serve("host", **small, **{"host-cache-gib": host_gib}),
                "pool for all": serve("enough", **{"num-blocks": enough}),
            }
            baseline = summaries["pool alone"]
            for key, summary in summaries.items():
                yield Figure(f"{key}: prompt tokens cached", f"{summary.decode_cached_share:.1%}")
                yield Figure(
                    f"{key}: requests/s",
                    f"{summary.requests_per_second:.2f}",
                    f"{baseline.requests_per_second:.2f}",
                    summary.requests_per_second / baseline.requests_per_second,
                )
                yield _latency(f"{key}: TTFT", summary.ttft, baseline.ttft)
                yield _latency(f"{key}: TPOT", summary.tpot, baseline.tpot)

        title = f"{name}, {documents} documents of {document_tokens} tokens, {concurrency} questions at a time"
        report.section(title, measure)
    return report.finish()


def _latency(what: str, measured: Distribution | None, against: Distribution | None) -> Figure:
    assert measured is not None
    assert against is not None
    return Figure(
        f"{what}, ms: mean, p50, p99",
        f"{measured.mean:.1f}, {measured.p50:.1f}, {measured.p99:.1f}",
        f"{against.mean:.1f}, {against.p50:.1f}, {against.p99:.1f}",
        measured.mean / against.mean,
    )


def _copies() -> Iterator[Figure]:
    from common.kv.pinned_memory import PinnedMemory  # needs cupy

    pool = allocate(LAYOUT, torch.device("cuda", torch.cuda.current_device()))
    memory = PinnedMemory(pool, LAYOUT.num_blocks)
    draw = random.Random(0)
    blocks, slots = (draw.sample(range(LAYOUT.num_blocks), MOVED) for _ in range(2))
    runs = {"save": lambda: memory.save(blocks, slots), "load": lambda: memory.load(slots, blocks)}
    plain = torch.empty(MOVED * LAYOUT.block_bytes, dtype=torch.uint8, pin_memory=True)
    device = pool.tensor.view(torch.uint8).flatten()[: len(plain)]
    whole = {
        "save": lambda: plain.copy_(device, non_blocking=True),
        "load": lambda: device.copy_(plain, non_blocking=True),
    }
    for key, start in runs.items():
        seconds, launching = launched(start, torch.cuda.synchronize, REPEATS)
        bound, _ = launched(whole[key], torch.cuda.synchronize, REPEATS)
        yield Figure(
            f"{key}: GB/s, and ms of CPU to launch",
            f"{len(plain) / seconds / 1e9:.1f}, {1000 * launching:.2f}",
            f"{len(plain) / bound / 1e9:.1f}",
            bound / seconds,
            AT_LEAST,
        )


if __name__ == "__main__":
    sys.exit(app())
