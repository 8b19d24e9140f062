"""A worker's end by signals, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

LOGS_WITHOUT_END = """
from structlog import get_logger
from common import logs
from common.lifecycle import Lifecycle

logs.configure("json")
lifecycle = Lifecycle(lambda: None, lambda: None, drain_seconds=5.0)
print("ready", flush=True)
while not lifecycle.over(idle=True):
    get_logger("worker").info("a line")
"""


def test_a_signal_ends_a_worker_that_is_logging() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", LOGS_WITHOUT_END],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(0.3)  # nobody reads the log: by now it waits inside of a line for the full pipe
        worker.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        log = worker.communicate(timeout=10)[1]
        assert '"event": "draining"' in log.splitlines()[-1]
        assert worker.returncode == 0
    finally:
        worker.kill()
        worker.communicate()
