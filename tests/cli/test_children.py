"""Child processes, as real ones."""

import signal
import sys
from pathlib import Path

import pytest

from cli.children import Child

ROOT = Path(__file__).parents[2]


def test_it_runs_nothing_of_the_folder_that_it_is_started_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cli", "common", "grpc", "signal"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'protos'}")
    with (tmp_path / "output").open("w+") as output:
        child = Child("probe", [sys.executable, "-m", "common.probe"], output)
        child.start()
        assert child.process is not None
        child.process.wait(timeout=30)
        output.seek(0)
        assert output.read().startswith("`python -m common.probe HOST:PORT [SERVICE]`")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 3)", f"was killed by signal {signal.SIGRTMIN + 3}"),
    ],
)
def test_every_death_has_words(program: str, words: str) -> None:
    child = Child("part", [sys.executable, "-c", f"import os, signal; {program}"])
    child.start()
    assert child.process is not None
    child.process.wait(timeout=30)
    assert child.death() == words
