"""The pages agree with the code and with one another."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.worker.config import WorkerConfig
from router.config import RouterConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_tables_are_those_of_the_code() -> None:
    command: list[str | Path] = [sys.executable, ROOT / "docs" / "tables.py", "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
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


def test_every_metric_of_the_dashboard_the_alerts_and_the_manual_exists() -> None:
    sources = [
        path for room in ("router", "common", "prefill_worker", "decode_worker") for path in (ROOT / room).rglob("*.py")
    ]
    exported = {
        SUFFIX.sub("", name) for path in sources for name in re.findall(r'"(twostroke_[a-z_]+)"', path.read_text())
    }
    for page in ("deploy/grafana/dashboards/twostroke.json", "deploy/alerts.yml", "docs/operations.md"):
        assert metrics_named_in(ROOT / page) - exported == set(), page


def test_what_the_manual_says_is_worth_an_alert_has_one() -> None:
    worth = re.search(r"Alert on\n\n.*?\n\n", (ROOT / "docs/operations.md").read_text(), re.DOTALL)
    assert worth is not None
    alerts = metrics_named_in(ROOT / "deploy/alerts.yml")
    assert {SUFFIX.sub("", name) for name in METRIC.findall(worth[0])} == alerts
    assert "rule_files: [alerts.yml]" in (ROOT / "deploy/prometheus.yml").read_text()
    assert "./deploy/alerts.yml:/etc/prometheus/alerts.yml:ro" in (ROOT / "compose.yaml").read_text()


@pytest.mark.parametrize(
    ("part", "seconds"), [("x-worker", WorkerConfig().drain_seconds), ("  router", RouterConfig().drain_seconds)]
)
def test_compose_waits_until_a_part_has_drained(part: str, seconds: float) -> None:
    block = re.search(rf"^{part}:.*?(?=^\S|^  [a-z]+:$)", (ROOT / "compose.yaml").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    grace = re.search(r"^ +stop_grace_period: (\d+)s$", block[0], re.MULTILINE)
    assert grace is not None
    assert int(grace[1]) > seconds


NO_TEXTS_OF_THE_CODE = {
    # gRPC's
    "ping timeout",
    "Connection refused",
    "Socket closed",
    "WRONG_VERSION_NUMBER",
    "CERTIFICATE_VERIFY_FAILED",
    "Hostname Verification Check failed",
    "Cancelling all calls",
    # put together
    "the smallest worker has room",
    "worker is connected on a decode worker's host",
    "twostroke serve: not ready yet",
    "its dtype is",
    "its fingerprint is",
}


def texts_of_the_code() -> str:
    """Every string that the parts may print or log; of a formatted one its fixed pieces, each on a line."""
    rooms = ("router", "common", "prefill_worker", "decode_worker", "kernels", "cli")
    trees = (ast.parse(path.read_text()) for room in rooms for path in (ROOT / room).rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_every_message_that_the_manual_explains_is_one_of_the_code() -> None:
    section = re.search(r"^## What each error means\n(.*?)^## ", (ROOT / "docs/operations.md").read_text(), re.M | re.S)
    assert section is not None
    quoted = [text for row in re.findall(r"^\| (`.*?) \|", section[1], re.M) for text in re.findall(r"`(.+?)`", row)]
    assert len(quoted) > 50
    texts, explained = texts_of_the_code(), set[str]()
    for text in quoted:
        without_code = re.sub(r"^[A-Z_]{6,}(: |$)", "", text)
        pieces = re.split(r"\.\.\.|'NAME'|\bN\b|(?<=no )prefill|\(decode\)", without_code)
        explained |= {piece.strip(" :,") for piece in pieces if len(piece.strip(" :,")) > 3}
    assert {piece for piece in explained - NO_TEXTS_OF_THE_CODE if piece not in texts} == set()
