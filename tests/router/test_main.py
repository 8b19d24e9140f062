"""A router as a process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.router import models

ROOT = Path(__file__).parents[2]


@contextmanager
def running(model: Path, *before: str) -> Iterator[subprocess.Popen[str]]:
    router = subprocess.Popen(
        [*before, sys.executable, "-m", "router", f"--model={model}", "--listen=127.0.0.1:0"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert router.stderr is not None
        assert any("router listening" in line for line in router.stderr)
        yield router
    finally:
        router.kill()
        router.communicate()


def test_a_model_with_a_window_is_for_its_workers_to_limit(tmp_path: Path) -> None:
    """They have a --max-length, and say it in their hello; a router has none."""
    model = models.write(tmp_path, models.byte_level())
    config = models.CONFIG | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 1024}
    (model / "config.json").write_text(json.dumps(config))
    with running(model) as router:
        router.send_signal(signal.SIGTERM)
        assert router.wait(timeout=10) == 0


def test_a_terminal_that_is_closed_stops_it_in_order(tmp_path: Path) -> None:
    with running(models.write(tmp_path, models.byte_level())) as router:
        router.send_signal(signal.SIGHUP)
        assert router.wait(timeout=10) == 0


def test_under_nohup_it_goes_on(tmp_path: Path) -> None:
    with running(models.write(tmp_path, models.byte_level()), "nohup") as router:
        router.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            router.wait(timeout=0.5)
        router.send_signal(signal.SIGTERM)
        assert router.wait(timeout=10) == 0
