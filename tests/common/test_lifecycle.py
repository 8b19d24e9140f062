"""A worker's end by signals, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.transport import segment
from tests.e2e.soak.holdings import mapped_segments
from tests.router import models

ROOT = Path(__file__).parents[2]

LOGS_WITHOUT_END = """
from structlog import get_logger
from common.telemetry import logs
from common.worker.lifecycle import Lifecycle

logs.configure("json")
lifecycle = Lifecycle(lambda: None, lambda: None, drain_seconds=5.0)
print("ready", flush=True)
while not lifecycle.over(idle=True):
    get_logger("worker").info("a line")
"""

# A worker with work that does not end.
DRAINS = """
import time
from common.worker.lifecycle import Lifecycle

lifecycle = Lifecycle(lambda: None, lambda: print("draining", flush=True), drain_seconds=60.0)
print("ready", flush=True)
while not lifecycle.over(idle=False):
    time.sleep(0.01)
"""

# A worker that gets no further than to what comes after its pool.
STARTS_WITHOUT_END = """
import sys, time
from common.worker import loading

def load_guided(*_):
    print("has its pool", flush=True)
    time.sleep(60)

loading.load_guided = load_guided
from cli.main import main
main(sys.argv.pop(1))
"""


@contextmanager
def started(program: str, *arguments: str, stderr: int) -> Iterator[subprocess.Popen[str]]:
    worker = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    try:
        yield worker
    finally:
        worker.kill()
        worker.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_worker_that_is_logging(number: signal.Signals) -> None:
    with started(LOGS_WITHOUT_END, stderr=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(0.3)  # nobody reads the log: by now it waits inside of a line for the full pipe
        worker.send_signal(number)
        time.sleep(0.1)
        log = worker.communicate(timeout=30)[1]
        assert '"event": "draining"' in log.splitlines()[-1]
        assert worker.returncode == 0


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_hangup_does_not_hurry_it_and_a_second_signal_to_end_does(first: signal.Signals) -> None:
    with started(DRAINS, stderr=subprocess.DEVNULL) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        worker.send_signal(first)
        assert worker.stdout.readline() == "draining\n"
        worker.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(timeout=0.5)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("role", "number"),
    [
        ("prefill-worker", signal.SIGTERM),
        ("decode-worker", signal.SIGTERM),
        ("decode-worker", signal.SIGINT),
        ("decode-worker", signal.SIGHUP),
    ],
)
def test_a_worker_that_is_stopped_while_it_starts_leaves_no_pool(
    tmp_path: Path, role: str, number: signal.Signals
) -> None:
    models.write(tmp_path, models.byte_level())
    flags = [f"--model={tmp_path}", "--load-format=dummy", "--device=cpu", "--num-blocks=64", "--threads=1"]
    with started(STARTS_WITHOUT_END, role, *flags, stderr=subprocess.DEVNULL) as worker:
        assert worker.stdout is not None
        assert "has its pool\n" in worker.stdout
        (pool,) = mapped_segments(worker.pid)
        worker.send_signal(number)
        assert worker.wait(timeout=30) == 128 + number
        assert not (segment.DIRECTORY / pool).exists()
