"""Cache-aware routing against round robin: prompts with shared prefixes on two prefill and two decode workers.

There are more prefixes than one worker's pool holds, but fewer than two hold, so a prefix that always goes to the same
worker is found there. The workers are real, and fresh for each way of choosing. The router runs in this process, where
its choice can be replaced.

    python -m benchmarks.routing --json routing.json
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import cyclopts
import structlog
from rich.console import Console
from rich.table import Table

from benchmarks.load.config import Limits, LoadConfig
from benchmarks.load.run import run
from benchmarks.load.summary import summarize
from common.model.model_config import load_config
from common.model.model_files import EMBEDDED, resolve
from common.transport import sweep
from router.cluster.worker import Worker
from router.config import RouterConfig
from router.dispatch import choose
from router.dispatch.request import Request
from router.grammars.guides import Guides
from router.prompts.tokenizer import Tokenizer
from router.server import Router
from twostroke import AsyncClient, event_loop

START_SECONDS = 120.0
HITS_BOUND = 1.5

app = cyclopts.App(help=__doc__)


@dataclass(frozen=True, slots=True)
class Figures:
    choice: str
    requests: int
    errors: int
    prompt_tokens: int
    prefill_hit_tokens: int
    decode_hit_tokens: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    requests_per_second: float

    @property
    def hit_tokens(self) -> int:
        return self.prefill_hit_tokens + self.decode_hit_tokens


@contextmanager
def round_robin() -> Iterator[None]:
    """In a `with` block, workers take turns, as far as they have room."""
    prefill_turns, decode_turns = count(), count()

    def best_prefill(request: Request, workers: Iterable[Worker]) -> Worker | None:
        able = [worker for worker in workers if worker.can_hold(request.length + 1) and worker.accepts_prefill]
        return able[next(prefill_turns) % len(able)] if able else None

    def best_decode(request: Request, able: list[Worker], prefill_of: choose.PrefillOf) -> Worker:
        return able[next(decode_turns) % len(able)]

    with patch.object(choose, "best_prefill", best_prefill), patch.object(choose, "best_decode", best_decode):
        yield


# ---------------------------------------------------------------- one run


def start_worker(role: str, router: str, num_blocks: int) -> subprocess.Popen[bytes]:
    flags = {"router": router, "device": "cpu", "threads": 1, "num-blocks": num_blocks}
    return subprocess.Popen(
        [sys.executable, "-m", f"{role}_worker", *(f"--{flag}={value}" for flag, value in flags.items())],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


async def all_connected(client: AsyncClient, workers: int) -> None:
    for _ in range(int(START_SECONDS / 0.2)):
        if sum(worker.ready for worker in (await client.load()).workers) == workers:
            return
        await asyncio.sleep(0.2)
    raise RuntimeError(f"not all of {workers} workers came within {START_SECONDS:g} s")


def stop(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait()


async def measure(name: str, load: LoadConfig, num_blocks: int) -> Figures:
    directory = resolve(EMBEDDED)
    model = load_config(directory)
    router = Router(RouterConfig(listen="127.0.0.1:0"), model, Tokenizer(directory, model), Guides(directory, model))
    target = f"127.0.0.1:{await router.start()}"
    with ExitStack() as workers:
        workers.callback(sweep)
        for role in ("prefill", "prefill", "decode", "decode"):
            workers.callback(stop, start_worker(role, target, num_blocks))
        async with AsyncClient(target) as client:
            await all_connected(client, 4)
            records = await run(client, load, lambda _: None)
        await router.stop(0)
    summary = summarize(records, Limits())
    if summary.ttft is None:
        raise RuntimeError(f"no request was answered: {summary.errors}")
    return Figures(
        choice=name,
        requests=summary.requests,
        errors=sum(summary.errors.values()),
        prompt_tokens=sum(record.prompt_tokens for record in records),
        prefill_hit_tokens=sum(record.prefill_cached_tokens for record in records),
        decode_hit_tokens=sum(record.decode_cached_tokens for record in records),
        ttft_p50_ms=summary.ttft.p50,
        ttft_p99_ms=summary.ttft.p99,
        requests_per_second=summary.requests_per_second,
    )


@app.default
def main(
    *,
    requests: int = 96,
    concurrency: int = 4,
    prefixes: int = 12,
    prefix_tokens: int = 256,
    num_blocks: int = 136,
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> int:
    """Measures both ways of choosing on this machine's CPU. Fails if cache-aware routing misses its bounds.

    Args:
        requests: measured requests. Others are sent before, to fill the pools.
        concurrency: requests at once.
        prefixes: number of different prefixes, drawn at random.
        prefix_tokens: tokens of a prefix; 24 more follow in each prompt.
        num_blocks: KV blocks of 16 tokens of each worker.
        json_file: also writes the figures there.
    """
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    load = LoadConfig(
        concurrency=concurrency,
        requests=requests,
        warmup=2 * prefixes,
        prompt_tokens="24",
        output_tokens="8",
        prefix_tokens=prefix_tokens,
        prefixes=prefixes,
    )
    figures = []
    for name, choosing in (("round robin", round_robin()), ("cache-aware", nullcontext())):
        with choosing:
            figures.append(event_loop.run(measure(name, load, num_blocks)))
    table = Table("choice", "answered", "prefill hits", "decode hits", "TTFT p50, p99 ms", "requests/s")
    for way in figures:
        table.add_row(
            way.choice,
            f"{way.requests - way.errors} of {way.requests}",
            f"{way.prefill_hit_tokens:,} of {way.prompt_tokens:,} tokens",
            f"{way.decode_hit_tokens:,}",
            f"{way.ttft_p50_ms:.0f}, {way.ttft_p99_ms:.0f}",
            f"{way.requests_per_second:.1f}",
        )
    baseline, ours = figures
    gain = ours.hit_tokens / max(baseline.hit_tokens, 1)
    no_slower = ours.ttft_p99_ms <= baseline.ttft_p99_ms
    console = Console(width=120)
    console.print(table)
    console.print(f"hits: {gain:.2f} times round robin's, at least {HITS_BOUND} wanted; p99 TTFT no worse: {no_slower}")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(way) for way in figures], indent=2) + "\n")
    return 0 if gain >= HITS_BOUND and no_slower else 1


if __name__ == "__main__":
    app()
