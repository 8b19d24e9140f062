"""Whole clusters in virtual time, one for each seed: real engines and dispatchers among random faults.

    python -m tests.simulation --seeds 1:200

It fails at the first seed whose cluster did what it must not; that seed alone does it again.
"""

import tempfile
import time
import traceback
from pathlib import Path

import cyclopts

from tests.simulation import logs, model
from tests.simulation.traffic import Traffic
from tests.simulation.world import run

BATCH = 10  # seeds

app = cyclopts.App(help=__doc__)


@app.default
def main(*, seeds: str = "1:100") -> int:
    """Simulates a cluster for each seed. Prints a line for every ten of them: a digest of what the parts said to each
    other, and how often what happened.

    Args:
        seeds: the first and the last, as 1:100.
    """
    first, last = map(int, seeds.split(":"))
    with tempfile.TemporaryDirectory() as directory, logs.only_exceptions():
        tiny = model.load(Path(directory))
    for start in range(first, last + 1, BATCH):
        batch = range(start, min(start + BATCH, last + 1))
        traffic, began = Traffic(), time.monotonic()
        for seed in batch:
            try:
                run(seed, tiny, traffic)
            except Exception as error:
                traceback.print_exc()
                print(f"seed {seed}: {type(error).__name__}: {error}")
                return 1
        happened = ", ".join(f"{what} {count:,}" for what, count in sorted(traffic.counts.items()))
        print(f"seeds {start}:{batch[-1]}, {time.monotonic() - began:.0f} s, {traffic.digest}: {happened}", flush=True)
    return 0


if __name__ == "__main__":
    app()
