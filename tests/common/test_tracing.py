"""Spans that are switched off, and settings that cannot work."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.security.security_config import SettingsError
from common.telemetry import tracing
from tests.router import models

ROOT = Path(__file__).parents[2]


def test_without_an_endpoint_nothing_is_made() -> None:
    spans = tracing.start(None, "test")
    span = spans.begin("call", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", {})
    assert span is tracing.OFF
    assert span.child("attempt", {}) is tracing.OFF
    assert spans.below("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01") is tracing.OFF
    assert span.traceparent == ""
    span.record("phase", time.monotonic(), {})
    span.note({})
    span.end({})
    spans.stop()


def test_without_an_endpoint_opentelemetry_is_not_imported() -> None:
    code = "import sys; from common.telemetry import tracing; tracing.start(None, 'x')"
    assert _run(f"{code}; print('opentelemetry' in sys.modules)").stdout == "False\n"


@pytest.mark.parametrize("endpoint", ["localhost:4317", "collector", ""])
def test_an_endpoint_that_is_no_url(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="--otlp-endpoint must be http://HOST:PORT"):
        tracing.start(endpoint, "test")


@pytest.mark.parametrize("part", ["router", "prefill_worker", "decode_worker"])
def test_what_is_missing_is_said_in_one_line(part: str, tmp_path: Path) -> None:
    """As where the extra is not installed: its packages cannot be found."""
    models.write(tmp_path, models.byte_level())
    code = (
        "import sys, runpy; sys.modules['opentelemetry'] = None; "
        f"sys.argv = ['-m', '--model={tmp_path}', '--otlp-endpoint=http://localhost:4317']; "
        f"runpy.run_module('{part}', run_name='__main__')"
    )
    started = _run(code)
    assert started.returncode == 1
    (line,) = started.stderr.splitlines()
    assert line.startswith(
        f"twostroke {part.replace('_', '-')}: --otlp-endpoint needs OpenTelemetry, which is not installed ("
    )
    assert line.endswith("): pip install 'twostroke[tracing]'")


def _run(code: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
