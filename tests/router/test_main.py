"""A router as a process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.router import models

ROOT = Path(__file__).parents[2]


def test_a_model_with_a_window_is_for_its_workers_to_limit(tmp_path: Path) -> None:
    """They have a --max-length, and say it in their hello; a router has none."""
    model = models.write(tmp_path, models.byte_level())
    config = models.CONFIG | {"architectures": ["MistralForCausalLM"], "sliding_window": 1024}
    (model / "config.json").write_text(json.dumps(config))
    router = subprocess.Popen(
        [sys.executable, "-m", "router", f"--model={model}", "--listen=127.0.0.1:0"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert router.stderr is not None
        assert "router listening" in router.stderr.readline()
        router.send_signal(signal.SIGTERM)
        assert router.wait(timeout=10) == 0
    finally:
        router.kill()
        router.communicate()
