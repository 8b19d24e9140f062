"""Where a prompt's hand-over begins to pay: times to the first and the second token of prompts of many lengths, where
the decode worker prefills them itself (in place) and where a prefill worker does (handed over), on the same two
workers, idle and under load.

    python -m benchmarks.gpu.crossover --out crossover.json

Two routers stand in front of the pair. One knows both workers, and hands every prompt over; the other knows only the
decode worker, which then prefills whatever comes.
"""

import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from cyclopts import App

from benchmarks.cluster import Cluster, Flags
from benchmarks.gpu import models
from benchmarks.load.config import LoadConfig
from benchmarks.load.processes import split, start
from benchmarks.report import Figure, Report
from common.network.free_port import free_port
from twostroke import AsyncClient, event_loop

OUTPUT_TOKENS = 8
TIMEOUT = 120.0
LEAD_SECONDS = 5.0  # for the load to become what it stays, before anything counts
TAIL_SECONDS = 5.0  # for the last round of prompts beside it
WAYS = ("in place", "handed over")

app = App(name="crossover", help_format="plaintext")


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds to the first token, and from that to the second."""

    first: float
    second: float

    @property
    def total(self) -> float:
        return self.first + self.second


def crossover(in_place: Mapping[int, float], handed_over: Mapping[int, float]) -> int | None:
    """The longest of the measured lengths up to which none is better handed over; None where even the shortest is."""
    best: int | None = None
    for length in sorted(in_place):
        if in_place[length] > handed_over[length]:
            break
        best = length
    return best


@app.default
def main(
    *,
    out: Path | None = None,
    device: str = "cuda",
    name: str = "llama-3.1-8b",
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    idle_seconds: float = 15.0,
    loaded_seconds: float = 30.0,
    rate: float = 10.0,
    prompt_tokens: str = "1750",
    output_tokens: str = "250",
    clients: int = 2,
    prefill_blocks: int = 8192,
    decode_blocks: int = 16384,
    max_batch: int = 256,
    max_batch_tokens: int = 2048,
    prefill_chunk_tokens: int = 512,
    logs: Path | None = None,
) -> int:
    """Measures both ways for every length, and says where they cross.

    Parameters
    ----------
    out: JSON file for the figures.
    name: model, by its name in benchmarks/gpu/models.py.
    lengths: of prompts, in tokens.
    idle_seconds: for which prompts of all lengths are sent one after another, both ways, to the idle pair.
    loaded_seconds: the same beside a load.
    rate: requests a second of that load, which is handed over.
    prompt_tokens: of its requests, as for `twostroke bench`.
    output_tokens: of its requests.
    clients: processes that the load comes from.
    prefill_chunk_tokens: of prompts that the decode worker computes between two steps.
    logs: folder for the cluster's logs; not set: one that is removed.
    """
    report = Report(out)
    first, second = ("cuda:0", "cuda:1") if device == "cuda" else (device, device)
    load = LoadConfig(
        rate=rate,
        duration=LEAD_SECONDS + loaded_seconds + TAIL_SECONDS,
        warmup=0,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder:
        model = models.write(name, Path(folder))
        worker = models.worker(model, device, max(lengths) + 1024)
        decode: Flags = {
            **worker,
            "device": first,
            "num-blocks": decode_blocks,
            "max-batch": max_batch,
            "listen": address,
            "prefill-tokens": 1,
            "prefill-chunk-tokens": prefill_chunk_tokens,
        }
        prefill: Flags = {
            **worker,
            "device": second,
            "num-blocks": prefill_blocks,
            "max-batch-tokens": max_batch_tokens,
        }
        folder_of_logs = logs or Path(folder) / "logs"
        pair = Cluster({"model": model}, [("decode_worker", decode), ("prefill_worker", prefill)], folder_of_logs)
        alone = Cluster({"model": model, "decode": address}, [], folder_of_logs / "in-place")

        def measure() -> Iterator[Figure]:
            context = multiprocessing.get_context("spawn")
            with pair, alone, ProcessPoolExecutor(clients, context) as pool:
                targets = {"in place": alone.target, "handed over": pair.target}
                event_loop.run(_probe(targets, lengths, 0.0, seed=1))  # warm-up: every length once, each way
                yield from _figures("idle", event_loop.run(_probe(targets, lengths, idle_seconds, seed=2)))
                loads = start(pool, pair.target, split(load, clients), TIMEOUT)
                time.sleep(LEAD_SECONDS)
                loaded = event_loop.run(_probe(targets, lengths, loaded_seconds, seed=3))
                failed = [record.error for load in loads for record in load.result() if record.error is not None]
                if failed:
                    raise RuntimeError(f"requests of the load failed: {failed}")
                yield from _figures(f"{rate:g} req/s of {prompt_tokens} + {output_tokens}", loaded)

        report.section(f"{name}, chunks of {prefill_chunk_tokens} tokens in place", measure)
    return report.finish()


Samples = Mapping[str, Mapping[int, list[Times]]]


async def _probe(targets: Mapping[str, str], lengths: tuple[int, ...], seconds: float, seed: int) -> Samples:
    """Rounds of one prompt of each length and way, one after another in random order, until `seconds` are over; at
    least one. Prompts are random, so that none is in a cache."""
    draw = random.Random(seed)
    samples: dict[str, dict[int, list[Times]]] = {way: defaultdict(list) for way in WAYS}
    ends = time.perf_counter() + seconds
    async with AsyncExitStack() as stack:
        clients = {way: await stack.enter_async_context(AsyncClient(targets[way], timeout=TIMEOUT)) for way in WAYS}
        vocabulary = range(1000, (await clients[WAYS[0]].model()).vocab_size)
        round_ = [(way, length) for way in WAYS for length in lengths]
        while True:
            draw.shuffle(round_)
            for way, length in round_:
                prompt = draw.choices(vocabulary, k=length)
                samples[way][length].append(await _times(clients[way], prompt))
            if time.perf_counter() >= ends:
                return samples


async def _times(client: AsyncClient, prompt: list[int]) -> Times:
    sent = time.perf_counter()
    came = [time.perf_counter() async for _ in _tokens(client, prompt)]
    return Times(1000 * (came[0] - sent), 1000 * (came[1] - came[0]))


async def _tokens(client: AsyncClient, prompt: list[int]) -> AsyncIterator[None]:
    async for piece in client.stream(prompt, max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True):
        if piece.token_ids:
            yield


def _figures(when: str, samples: Samples) -> Iterator[Figure]:
    """Medians of every length, and where they cross."""
    totals: dict[str, dict[int, float]] = {way: {} for way in WAYS}
    for length in sorted(samples[WAYS[0]]):
        shown = []
        for way in WAYS:
            times = samples[way][length]
            totals[way][length] = statistics.median(time.total for time in times)
            first, second = (
                statistics.median(column) for column in ((t.first for t in times), (t.second for t in times))
            )
            shown.append(f"{first:.1f} + {second:.1f} ms")
        yield Figure(
            f"{when}: TTFT + first ITL, {length} tokens, in place",
            shown[0],
            f"handed over {shown[1]}",
            totals["in place"][length] / totals["handed over"][length],
        )
    rounds = len(next(iter(samples[WAYS[0]].values())))
    longest = crossover(totals["in place"], totals["handed over"])
    what = "never" if longest is None else f"up to {longest} tokens"
    yield Figure(f"{when}: in place is no slower", what, f"medians of {rounds} rounds")


if __name__ == "__main__":
    sys.exit(app())
