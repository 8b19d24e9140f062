"""What `twostroke bench` says where there is nothing to say, or nowhere to."""

from pathlib import Path

import pytest

from benchmarks.load.record import Record
from cli import bench

ANSWERED = Record(due=0.0, ended=1.0, prompt_tokens=8, deltas=((0.5, 1), (1.0, 1)))


def measure(monkeypatch: pytest.MonkeyPatch, *records: Record) -> None:
    async def measured(connection: object, load: object, measured: bench._Measured) -> None:
        measured.records += records

    monkeypatch.setattr(bench, "_measure", measured)
    monkeypatch.setattr("cli.options._drop_output", lambda: None)


def test_a_rate_so_low_that_nothing_is_due_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch)
    with pytest.raises(SystemExit, match="no request was due within --duration"):
        bench.bench()


def test_a_file_that_cannot_be_written_is_named_after_the_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(monkeypatch, ANSWERED)
    with pytest.raises(SystemExit, match=f"twostroke: {tmp_path}: Is a directory"):
        bench.bench(json=tmp_path)
    assert "TTFT" in capsys.readouterr().out
