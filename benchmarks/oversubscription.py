"""Whether more demand than a pool holds costs throughput. Measures the tokens per second of a cluster whose decode pool
holds a few requests, with as many requests at once as fit, and with two and four times as many.

First attempts reserve little room for output, so that sequences outgrow the pool and are preempted. The levels take
turns, so that other programs on the machine disturb all of them alike, and the median of each counts.

    python -m benchmarks.oversubscription --json oversubscription.json
"""

import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import cyclopts
from rich.console import Console
from rich.table import Table

from benchmarks.cluster import Cluster
from common.model.model_files import EMBEDDED
from twostroke import Client

BLOCK_SIZE = 16
LEVELS = (1, 2, 4)
WANTED = 0.8

app = cyclopts.App(help=__doc__)


@dataclass(frozen=True, slots=True)
class Level:
    times: int  # demand, in multiples of what fits
    tokens_per_second: float
    resumes: float  # per request
    slowest_seconds: float  # of the slowest request


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def measure(target: str, callers: int, rounds: int, prompt_tokens: int, output_tokens: int, salt: str) -> Level:
    """Has `callers` callers make `rounds` requests each, one after another."""

    def call(caller: int) -> list[tuple[float, int]]:
        answers = []
        with Client(target, timeout=300) as client:
            for turn in range(rounds):
                prompt = [50 + (caller * 7 + turn * 31 + place) % 500 for place in range(prompt_tokens)]
                began = time.monotonic()
                answer = client.generate(
                    prompt,
                    max_tokens=output_tokens,
                    temperature=0,
                    ignore_eos=True,
                    cache_salt=f"{salt}-{caller}-{turn}",
                )
                answers.append((time.monotonic() - began, answer.finish.usage.resumes))
        return answers

    began = time.monotonic()
    with ThreadPoolExecutor(callers) as pool:
        answers = [answer for caller in pool.map(call, range(callers)) for answer in caller]
    elapsed = time.monotonic() - began
    return Level(
        times=0,
        tokens_per_second=len(answers) * output_tokens / elapsed,
        resumes=sum(resumes for _, resumes in answers) / len(answers),
        slowest_seconds=max(seconds for seconds, _ in answers),
    )


def median(times: int, measured: list[Level]) -> Level:
    return Level(
        times,
        statistics.median(level.tokens_per_second for level in measured),
        statistics.median(level.resumes for level in measured),
        statistics.median(level.slowest_seconds for level in measured),
    )


@app.default
def main(
    *,
    model: str = EMBEDDED,
    load_format: Literal["auto", "dummy"] = "auto",
    fitting: int = 4,
    repeats: int = 3,
    requests: int = 16,
    prompt_tokens: int = 32,
    output_tokens: int = 96,
    headroom_tokens: int = 16,
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> int:
    """Measures on this machine's CPU. Fails if 4 times the demand misses its bound.

    Args:
        model: the embedded one's name, or a Hugging Face directory.
        load_format: of the workers; dummy makes up weights.
        fitting: requests that the decode worker's pool holds at their full length.
        repeats: runs of each level.
        requests: in each run, whatever the level.
        prompt_tokens: of each request.
        output_tokens: of each answer.
        headroom_tokens: of output that a first attempt reserves room for.
        json_file: also writes the figures there.
    """
    pool = fitting * blocks(prompt_tokens + output_tokens)
    common = {"model": model, "load-format": load_format, "device": "cpu", "threads": 1}
    workers = [("prefill_worker", {**common, "num-blocks": 1024}), ("decode_worker", {**common, "num-blocks": pool})]
    runs: dict[int, list[Level]] = {times: [] for times in LEVELS}
    with (
        tempfile.TemporaryDirectory() as logs,
        Cluster({"model": model, "headroom-tokens": headroom_tokens}, workers, Path(logs)) as cluster,
    ):
        measure(cluster.target, fitting, 1, prompt_tokens, output_tokens, "warm-up")
        for repeat in range(repeats):
            for times in LEVELS:
                callers = times * fitting
                rounds = max(1, requests // callers)
                salt = f"{repeat}-{times}"
                runs[times].append(measure(cluster.target, callers, rounds, prompt_tokens, output_tokens, salt))
    levels = [median(times, measured) for times, measured in runs.items()]
    peak = max(level.tokens_per_second for level in levels)
    ratio = levels[-1].tokens_per_second / peak
    table = Table("demand", "tokens/s", "of the peak", "resumes a request", "slowest request, s")
    for level in levels:
        table.add_row(
            f"{level.times} times what fits",
            f"{level.tokens_per_second:.1f}",
            f"{level.tokens_per_second / peak:.2f}",
            f"{level.resumes:.2f}",
            f"{level.slowest_seconds:.1f}",
        )
    console = Console(width=100)
    console.print(table)
    console.print(f"at {LEVELS[-1]} times the demand: {ratio:.2f} of the peak; at least {WANTED} wanted")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(level) for level in levels], indent=2) + "\n")
    return 0 if ratio >= WANTED else 1


if __name__ == "__main__":
    app()
