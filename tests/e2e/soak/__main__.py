"""Minutes of mixed load with random faults on a cluster of a tiny model, and a table of what happened.

    python -m tests.e2e.soak --minutes 30 --seed 1

It fails where a request had no answer or the wrong one, or where something was left behind.
"""

import tempfile
from pathlib import Path

import cyclopts
from rich.console import Console

from tests.e2e.soak.run import soak
from tests.e2e.soak.table import tables

app = cyclopts.App(help=__doc__)


@app.default
def main(*, minutes: float = 30, seed: int = 1, logs: Path | None = None) -> int:
    """Soaks a cluster of two routers, two prefill and two decode workers on this machine.

    Args:
        minutes: how long; a quiet point follows after every minute.
        seed: of questions, callers and faults.
        logs: folder for the parts' logs; a new one under the system's temporary folder where not set.
    """
    console = Console(width=120)
    directory = logs or Path(tempfile.mkdtemp(prefix="twostroke-soak-"))
    directory.mkdir(parents=True, exist_ok=True)
    console.print(f"seed {seed}, logs in {directory}")
    report = soak(directory, 60 * minutes, seed, console.print)
    for table in tables(report):
        console.print(table)
    for problem in report.problems:
        console.print(problem, style="red", markup=False)
    console.print(f"{len(report.problems)} problems")
    return 1 if report.problems else 0


if __name__ == "__main__":
    app()
