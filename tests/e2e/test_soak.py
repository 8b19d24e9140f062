"""Soaks of seconds and of minutes; `make soak` runs one of half an hour."""

from pathlib import Path

import pytest

from tests.e2e.soak.run import Report, soak

pytestmark = pytest.mark.e2e


def sound(directory: Path, seconds: float, seed: int) -> Report:
    report = soak(directory, seconds, seed)
    assert report.problems == []
    for outcome in ("answered", "left", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT"):
        assert any(ended == outcome for _, ended in report.tally.counts), report.tally.counts
    return report


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_short_soak(tmp_path: Path) -> None:
    report = sound(tmp_path, seconds=8, seed=228)
    # This seed begins with the one while the other decode worker is stopped.
    assert report.faults["decode-0", "kill"]
    assert report.faults["decode-1", "stop"]
    assert report.tally.kinds.total() > 50


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_soak_of_minutes(tmp_path: Path) -> None:
    report = sound(tmp_path, seconds=180, seed=4)
    assert {fault for _, fault in report.faults} == {"kill", "drain", "stop"}
    assert report.tally.kinds.total() > 500
    assert report.tally.resumes > 20
