"""Whole clusters in virtual time, one for each seed: real engines and dispatchers among random faults.

    python -m tests.simulation --seeds 1:200

It fails at the first seed whose cluster did what it must not; that seed alone does it again.
"""

import tempfile
import time
import traceback
from collections import Counter
from hashlib import sha256
from pathlib import Path

import cyclopts

from tests.simulation import model
from tests.simulation.world import run

BATCH = 10  # seeds

app = cyclopts.App(help=__doc__)


@app.default
def main(*, seeds: str = "1:100") -> int:
    """Simulates a cluster for each seed, and prints what happened in every ten of them.

    Args:
        seeds: the first and the last, as 1:100.
    """
    first, last = map(int, seeds.split(":"))
    with tempfile.TemporaryDirectory() as directory:
        tiny = model.load(Path(directory))
    for start in range(first, last + 1, BATCH):
        batch = range(start, min(start + BATCH, last + 1))
        counts: Counter[str] = Counter()
        digest, began = sha256(), time.monotonic()
        for seed in batch:
            try:
                report = run(seed, tiny)
            except Exception as error:
                traceback.print_exc()
                print(f"seed {seed}: {type(error).__name__}: {error}")
                return 1
            counts += report.counts
            digest.update(report.digest.encode())
        happened = ", ".join(f"{what} {count:,}" for what, count in sorted(counts.items()))
        seconds = time.monotonic() - began
        print(f"seeds {start}:{batch[-1]}, {seconds:.0f} s, {digest.hexdigest()[:12]}: {happened}", flush=True)
    return 0


if __name__ == "__main__":
    app()
