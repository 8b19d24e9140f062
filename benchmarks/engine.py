"""The engine on a CPU: in one process against transformers' `generate`, and a whole cluster against one process.

    python -m benchmarks.engine --threads 1 --out engine.json

All in float32, greedy, SmolLM2, with the same number of torch threads. The two sides take turns, round by round, and
the median of the rounds' ratios counts. Answers are compared, too: different tokens would make the figures void.
"""

import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cyclopts import App
from transformers import AutoModelForCausalLM

from benchmarks.cluster import Cluster
from benchmarks.in_process import InProcess, spec
from benchmarks.parts import LoadedModel, load_model, worker_parts
from benchmarks.report import Figure, Report
from common.device.cpu_memory import keep_freed_memory
from common.model.model_files import EMBEDDED, resolve
from decode_worker.loop import DecodeLoop
from decode_worker.runner import Runner
from decode_worker.scheduler import Sequence
from twostroke import AsyncClient, event_loop

CPU = torch.device("cpu")
MAX_LENGTH = 2048
BLOCKS = 1024
ENGINE_BOUND = 1.0
CLUSTER_BOUND = 0.85

app = App(name="engine", help_format="plaintext")


@app.default
def main(
    *,
    threads: int = 1,
    batches: tuple[int, ...] = (1, 8, 16),
    streams: tuple[int, ...] = (8, 16),
    prompt_tokens: int = 64,
    output_tokens: int = 64,
    rounds: int = 3,
    out: Path | None = None,
) -> int:
    """Measures the engine on this machine's CPU."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # transformers runs in this process and benefits from it, too
    directory = resolve(EMBEDDED)
    loaded = load_model(directory, "float32", CPU, dummy=False, max_length=MAX_LENGTH)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    report = Report(out)
    for batch in batches:
        prompts = _prompts(batch, prompt_tokens)
        report.section(
            f"batch {batch}", partial(_against_transformers, loaded, reference, prompts, output_tokens, rounds)
        )
    for count in streams:
        prompts = _prompts(count, prompt_tokens)
        report.section(f"{count} streams", partial(_cluster, loaded, prompts, output_tokens, rounds, threads))
    return report.finish()


def _prompts(count: int, length: int) -> list[list[int]]:
    draw = random.Random(count)
    return [draw.choices(range(100, 40_000), k=length) for _ in range(count)]


def _against_transformers(
    loaded: LoadedModel, reference: Any, prompts: list[list[int]], count: int, rounds: int
) -> Iterator[Figure]:
    batch = len(prompts)
    engine = InProcess(
        worker_parts(loaded, BLOCKS), worker_parts(loaded, BLOCKS), max_batch=batch, max_batch_tokens=MAX_LENGTH
    )
    # An end-of-sequence token that no vocabulary has: every answer is `count` tokens long.
    greedy = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1 << 30}
    ours, theirs = [], []
    for index in range(rounds):
        salted = [spec(tokens, len(tokens) + count, temperature=0, root=bytes([index]) * 16) for tokens in prompts]
        started = time.perf_counter()
        answers = engine.run(salted)
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        generated = reference.generate(torch.tensor(prompts), **greedy)
        theirs.append(time.perf_counter() - started)
        if [row[len(prompts[0]) :] for row in generated.tolist()] != answers:
            raise AssertionError("the engine's tokens are not those of transformers")
    yield Figure(
        f"engine in process, batch {batch}",
        f"{batch * count / statistics.median(ours):.1f} tok/s",
        f"{batch * count / statistics.median(theirs):.1f} transformers",
        statistics.median(their / our for our, their in zip(ours, theirs, strict=True)),
        ENGINE_BOUND,
    )


def _cluster(loaded: LoadedModel, prompts: list[list[int]], count: int, rounds: int, threads: int) -> Iterator[Figure]:
    flags = {"threads": threads, "dtype": "float32", "device": "cpu", "num-blocks": BLOCKS}
    bare, delivered = [], []
    with (
        tempfile.TemporaryDirectory() as logs,
        Cluster({}, [("prefill_worker", flags), ("decode_worker", flags)], Path(logs)) as cluster,
    ):
        for _ in range(rounds):
            bare.append(_bare_decode_rate(loaded, prompts, count))
            delivered.append(event_loop.run(_delivered_rate(cluster.target, prompts, count)))
    yield Figure(
        f"cluster, {len(prompts)} streams, decoding",
        f"{statistics.median(delivered):.1f} tok/s",
        f"{statistics.median(bare):.1f} in process",
        statistics.median(cluster / alone for cluster, alone in zip(delivered, bare, strict=True)),
        CLUSTER_BOUND,
    )


def _bare_decode_rate(loaded: LoadedModel, prompts: list[list[int]], count: int) -> float:
    """Tokens per second of the decode loop, with every sequence in the batch. KV is noise, which takes as long."""
    parts = worker_parts(loaded, BLOCKS)
    loop = DecodeLoop(parts, Runner(parts, len(prompts)), len(prompts))
    for index, tokens in enumerate(prompts):
        sequence = Sequence(index, 0, spec(tokens, len(tokens) + count, temperature=0), list(tokens))
        assert loop.scheduler.reserve(sequence, count)
        sequence.tokens.append(1)
        loop.start(sequence)
    turns = 0
    started = time.perf_counter()
    while loop.busy:
        loop.turn()
        turns += 1
    return len(prompts) * turns / (time.perf_counter() - started)


async def _delivered_rate(target: str, prompts: list[list[int]], count: int) -> float:
    """Tokens per second that clients receive while all streams decode."""
    async with AsyncClient(target) as client:
        salt = str(time.monotonic_ns())
        arrivals = await asyncio.gather(*(_arrivals(client, tokens, count, salt) for tokens in prompts))
    begin = max(times[0] for times in arrivals)
    end = min(times[-1] for times in arrivals)
    return sum(begin < moment <= end for times in arrivals for moment in times) / (end - begin)


async def _arrivals(client: AsyncClient, tokens: list[int], count: int, salt: str) -> list[float]:
    times: list[float] = []
    async for piece in client.stream(tokens, max_tokens=count, temperature=0, ignore_eos=True, cache_salt=salt):
        times += [time.perf_counter()] * len(piece.token_ids)
    return times[1:]  # the first is the prefill worker's


if __name__ == "__main__":
    sys.exit(app())
