"""A part that cannot start says why in one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from cli.commands import app

ROOT = Path(__file__).parents[2]


def last_words(part: str, *flags: str) -> str:
    """The last line of what a part says that cannot start."""
    started = subprocess.run(
        [sys.executable, "-m", part, *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert started.returncode == 1
    assert "Traceback" not in started.stderr
    return started.stderr.splitlines()[-1]


@pytest.mark.parametrize("part", ["router", "prefill_worker", "decode_worker"])
def test_a_model_that_is_not_there(part: str) -> None:
    said = last_words(part, "--model=/no/such/model")
    assert said.startswith(f"twostroke {part.replace('_', '-')}: '/no/such/model' is neither the embedded model")


def test_memory_that_is_not_there() -> None:
    said = last_words("prefill_worker", "--device=cpu", "--num-blocks=4", "--host-cache-gib=1000000")
    assert said.startswith("twostroke prefill-worker: --host-cache-gib 1e+06 is more than nine tenths of the memory ")


@pytest.mark.parametrize(
    ("command", "flag", "values"),
    [
        ("router", "decode", ("foo:bar", ".svc:8601")),
        ("router", "prefill", ("decode:8601 foo", "::1:8601")),
        ("router", "listen", ("localhost", "127.0.0.1:65536")),
        ("router", "headroom-tokens", ("-5",)),
        ("router", "max-queue", ("-1", "0")),
        ("router", "max-resumes", ("-1",)),
        ("router", "worker-grace", ("-1", "nan")),
        ("router", "worker-silence-seconds", ("0", "1")),
        ("router", "metrics-port", ("-1", "65536")),
        ("prefill-worker", "block-size", ("0",)),
        ("prefill-worker", "max-batch-tokens", ("0",)),
        ("prefill-worker", "lease-seconds", ("0",)),
        ("prefill-worker", "host-cache-gib", ("-1", "nan")),
        ("prefill-worker", "drain-seconds", ("-1",)),
        ("decode-worker", "device", ("gpu", "cuda:x", "0")),
        ("decode-worker", "router", ("router:x",)),
        ("decode-worker", "advertise", ("here",)),
        ("decode-worker", "num-blocks", ("0", "-1")),
        ("decode-worker", "threads", ("0",)),
        ("decode-worker", "max-batch", ("0",)),
        ("decode-worker", "prefill-tokens", ("-1",)),
        ("decode-worker", "prefill-chunk-tokens", ("0",)),
        ("serve", "decode-workers", ("0",)),
        ("serve", "block-size", ("0",)),
        ("serve", "listen", ("localhost",)),
    ],
)
def test_a_setting_out_of_its_range_is_named(
    command: str, flag: str, values: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"TWOSTROKE_{flag.replace('-', '_').upper()}"
    for value in values:
        flags = [f"--{flag}={part}" for part in value.split()]
        with pytest.raises(CycloptsError, match=f'Invalid value "[^"]*" for --{flag}. Must be '):
            app.parse_args([command, *flags], exit_on_error=False, print_error=False)
        monkeypatch.setenv(variable, value)
        with pytest.raises(CycloptsError, match=f'Invalid value "[^"]*" for {variable} provided by env. Must be '):
            app.parse_args([command], exit_on_error=False, print_error=False)
