import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.load.config import LoadConfig
from benchmarks.load.record import Record
from benchmarks.load.run import run
from benchmarks.load.workload import arrivals
from tests.protos.fake_router import FakeRouter, serving
from twostroke import AsyncClient

LOAD = LoadConfig(requests=12, warmup=2, prompt_tokens="uniform:1,9", output_tokens="6")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with serving(FakeRouter(step_seconds=0.01, tokens_per_delta=2)) as router:
        yield router


async def records_of(router: FakeRouter, load: LoadConfig) -> list[Record]:
    seen: list[Record] = []
    async with AsyncClient(router.address) as client:
        records = await run(client, load, seen.append)
    assert records == seen
    return records


async def test_closed_loop(router: FakeRouter) -> None:
    records = await records_of(router, replace(LOAD, concurrency=3, warmup=0))
    assert router.most_running == 3
    assert len(router.requests) == len(records) == 12
    for record in records:
        assert [count for _, count in record.deltas] == [2, 2, 2]
        assert record.due < record.deltas[0][0] < record.deltas[1][0] < record.deltas[2][0] <= record.ended
        assert record.ended - record.due >= 3 * 0.009  # less than a step may lie between two that were read late
    assert [len(request.token_ids.ids) for request in router.requests] != [5] * 12
    assert all(request.stopping.ignore_eos and request.stopping.max_tokens == 6 for request in router.requests)


async def test_open_loop_does_not_wait_for_answers(router: FakeRouter) -> None:
    router.step_seconds = 0.5
    records = await records_of(router, replace(LOAD, rate=100.0, warmup=0))
    due = sorted(record.due for record in records)
    assert due == pytest.approx([time for time, _ in zip(arrivals(100.0, LOAD.seed), range(12), strict=False)])
    assert router.most_running >= 10


async def test_warm_up_is_not_measured(router: FakeRouter) -> None:
    assert len(await records_of(router, replace(LOAD, concurrency=2))) == 12
    assert len(router.requests) == 14


async def test_duration(router: FakeRouter) -> None:
    records = await records_of(router, replace(LOAD, concurrency=1, requests=None, duration=0.2, warmup=0))
    assert 1 <= len(records) <= 7  # each takes 30 ms or more
    assert all(record.due < 0.2 for record in records)
    assert all(record.output_tokens == 6 for record in records)


async def test_errors_are_counted_by_code(router: FakeRouter) -> None:
    async with AsyncClient(router.address, timeout=0.015) as client:
        records = await run(client, replace(LOAD, concurrency=4, warmup=0), lambda record: None)
    assert {record.error for record in records} == {"DEADLINE_EXCEEDED"}


def test_the_command(router: FakeRouter, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "bench", "--requests=8", "--concurrency=4", "--output-tokens=6"]
    command += ["--json", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.png"), "--ttft-limit=10000"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "TWOSTROKE_TARGET": router.address}
    table = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "TTFT" in table
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["model"] == "fake"
    assert document["load"]["concurrency"] == 4
    assert document["summary"]["requests"] == len(document["requests"]) == 8
    assert document["summary"]["goodput_share"] == 1.0
    assert document["summary"]["output_tokens_per_second"] == pytest.approx(48 / document["summary"]["seconds"])
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_in_which_most_requests_failed_did_not_do_well(router: FakeRouter) -> None:
    router.api_key = "secret"
    command = [sys.executable, "-m", "cli.main", "bench", "--requests=2", "--warmup=0", "--target", router.address]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    run = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 1
    assert "2 UNAUTHENTICATED" in run.stdout
    assert run.stderr.endswith("twostroke: most requests failed\n")


def test_ctrl_c_leaves_the_figures_of_what_had_ended(router: FakeRouter, tmp_path: Path) -> None:
    router.step_seconds = 0.05
    command = [sys.executable, "-m", "cli.main", "bench", "--requests=1000", "--concurrency=2", "--warmup=0"]
    command += ["--output-tokens=4", "--json", str(tmp_path / "run.json"), "--target", router.address]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 20
        while len(router.requests) < 5 and time.monotonic() < deadline:  # then two had ended
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "TTFT" in output
    assert errors.endswith("twostroke: interrupted; the figures are of the requests that had ended\n")
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["interrupted"]
    assert 2 <= document["summary"]["requests"] < 1000


def test_a_wrong_load_is_a_sentence(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    command = [sys.executable, "-m", "cli.main", "bench", "--rate=1", "--concurrency=1"]
    run = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode != 0
    assert "not both" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
