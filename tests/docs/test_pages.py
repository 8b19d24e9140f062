"""The pages agree with the code and with one another."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_tables_are_those_of_the_code() -> None:
    command = [sys.executable, ROOT / "docs" / "tables.py", "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


METRIC = re.compile(r"\btwostroke_[a-z_]+\b")
SUFFIX = re.compile(r"_(bucket|sum|count|total)$")  # what Prometheus adds to a metric's name


def metrics_named_in(path: Path) -> set[str]:
    return {SUFFIX.sub("", name) for name in METRIC.findall(path.read_text())}


def test_every_metric_of_the_dashboard_and_the_manual_exists() -> None:
    sources = [
        path for room in ("router", "common", "prefill_worker", "decode_worker") for path in ROOT.glob(f"{room}/*.py")
    ]
    exported = {
        SUFFIX.sub("", name) for path in sources for name in re.findall(r'"(twostroke_[a-z_]+)"', path.read_text())
    }
    for path in (ROOT / "deploy/grafana/dashboards/twostroke.json", ROOT / "docs/operations.md"):
        assert metrics_named_in(path) - exported == set(), path.name
