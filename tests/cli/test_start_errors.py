"""A part that cannot start says why in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", ["router", "prefill_worker", "decode_worker"])
def test_a_model_that_is_not_there(part: str) -> None:
    started = subprocess.run(
        [sys.executable, "-m", part, "--model=/no/such/model"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert started.returncode == 1
    (line,) = started.stderr.splitlines()
    assert line.startswith("twostroke: '/no/such/model' is neither the embedded model")
