import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO

import pytest
from rich.console import Console

from cli.top import BAR_CELLS, Sample, frame
from tests.cli.test_main import ENVIRONMENT, ROOT, twostroke
from tests.protos.fake_router import FakeRouter, serving
from twostroke.v1 import inference_pb2 as pb

PREFILL, DECODE = pb.WORKER_ROLE_PREFILL, pb.WORKER_ROLE_DECODE


def load(answered: int, prompt: int, cached: int, output: int) -> pb.GetLoadResponse:
    blocks = pb.Blocks(total=100, free=40, cached=35, in_use=25, reserved=10)
    return pb.GetLoadResponse(
        queued=3,
        running=1234,
        answered=answered,
        workers=[
            pb.WorkerLoad(
                address="10.0.0.2:1",
                instance="d",
                role=DECODE,
                ready=False,
                waiting=2,
                running=60,
                blocks=blocks,
                totals=pb.Totals(prompt_tokens=prompt + prompt // 4, prefilled_tokens=prompt // 4),
            ),
            pb.WorkerLoad(
                address="10.0.0.1:1",
                instance="p",
                role=PREFILL,
                ready=True,
                leases=7,
                blocks=blocks,
                totals=pb.Totals(
                    prompt_tokens=prompt, prefilled_tokens=prompt, cached_tokens=cached, output_tokens=output
                ),
            ),
        ],
    )


def text(before: Sample, now: Sample, width: int = 200) -> list[str]:
    console = Console(file=StringIO(), width=width)
    with console.capture() as capture:
        console.print(frame(before, now, console))
    return capture.get().splitlines()


def test_rates_come_from_two_looks() -> None:
    before, now = Sample(10.0, load(5, 1000, 100, 10)), Sample(12.0, load(8, 5000, 2500, 20))
    summary, _, heading, prefill, decode, *_ = text(before, now)
    assert summary.strip() == "3 queued, 1,234 running; 1.5 requests/s, 2,500 tokens/s in, 5 out"
    assert heading.split()[:4] == ["role", "worker", "state", "waiting"]
    assert prefill.split()[:9] == ["prefill", "10.0.0.1:1", "ready", "0", "0", "7", "2,000", "5", "50%"]
    assert decode.split()[:7] == ["decode", "10.0.0.2:1", "draining", "2", "60", "2,500", "0"]


def test_a_restarted_worker_and_router_count_from_nothing() -> None:
    later = load(0, 10, 5, 1)
    for worker in later.workers:
        worker.instance += " started again"
    summary, *_ = text(Sample(0.0, load(5, 1000, 100, 10)), Sample(1.0, later))
    assert summary.strip() == "3 queued, 1,234 running; 0.0 requests/s, 0 tokens/s in, 0 out"


def test_a_worker_that_is_of_no_use_is_told_with_the_reason() -> None:
    now = load(0, 0, 0, 0)
    reason = "refused: its dtype is 'bfloat16', and that of 10.0.0.2:1 is 'float32'" + ", as long as it is" * 5
    now.problems.add(address="10.0.0.3:1", role=DECODE, reason=reason)
    lines = text(Sample(0.0, load(0, 0, 0, 0)), Sample(1.0, now))
    assert lines[0].strip() == f"decode worker 10.0.0.3:1 {reason}"
    assert lines[2:] == text(Sample(0.0, load(0, 0, 0, 0)), Sample(1.0, load(0, 0, 0, 0)))


def test_the_bar_has_a_cell_for_every_share() -> None:
    line = text(Sample(0.0, load(0, 0, 0, 0)), Sample(1.0, load(0, 0, 0, 0)))[3]
    counts = [line.count(sign) for sign in "█▓▒░"]
    assert sum(counts) == BAR_CELLS
    assert counts == [6, 2, 9, 7]  # 25, 10, 35 and 40 - 10 of 100
    assert line.endswith(" 25/10/35/40")


def test_nothing_is_cut_off_on_a_terminal_of_80_columns() -> None:
    lines = text(Sample(0.0, load(0, 0, 0, 0)), Sample(1.0, load(0, 100_000, 0, 1000)), width=80)
    assert not any("…" in line for line in lines)
    (row,) = (line for line in lines if line.startswith("prefill"))
    assert row.split() == ["prefill", "10.0.0.1:1", "ready", "0", "0", "7", "100,000", "1,000", "0%"]
    assert [line.split()[-1] for line in lines if "█" in line and "/" in line][:2] == ["25/10/35/40"] * 2


def test_what_is_in_host_memory_is_told_beside_the_blocks() -> None:
    now = load(0, 0, 0, 0)
    now.workers[1].host_blocks.MergeFrom(pb.Blocks(total=5_000, free=1_000, cached=4_000))
    for width in (200, 80):
        lines = text(Sample(0.0, load(0, 0, 0, 0)), Sample(1.0, now), width)
        blocks = [line.rstrip() for line in lines if "25/10/35/40" in line]
        assert [line.partition("25/10/35/40")[2] for line in blocks] == [" + 4,000/5,000 in host memory", ""]
        assert not any("…" in line for line in lines)


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with serving(FakeRouter(load=load(8, 5000, 2500, 20))) as router:
        yield router


def test_once_prints_one_frame(router: FakeRouter) -> None:
    run = twostroke("top", "--once", "--interval", "0.1", "--target", router.address)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("10.0.0.1:1") == 1
    assert "3 queued, 1,234 running; 0.0 requests/s" in run.stdout


def test_once_without_a_router_says_so() -> None:
    run = twostroke("top", "--once", "--target", "127.0.0.1:1")
    assert run.returncode == 1
    assert run.stderr.startswith("twostroke: UNAVAILABLE: ")


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_it_watches_until_ctrl_c(router: FakeRouter, term: str) -> None:
    terminal, its_end = pty.openpty()
    command = [sys.executable, "-m", "cli.main", "top", "--interval", "0.1", "--target", router.address]
    environment = ENVIRONMENT | {"TERM": term}
    watching = subprocess.Popen(command, stdin=its_end, stdout=its_end, stderr=its_end, env=environment, cwd=ROOT)
    os.close(its_end)
    try:
        _read_until(terminal, b"10.0.0.1:1")
        router.load = load(8, 5000, 2500, 20)
        router.load.queued = 77
        _read_until(terminal, b"77 queued")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(timeout=30) == 0
    finally:
        watching.kill()
        watching.wait()
        os.close(terminal)


def test_it_writes_to_who_reads_it(router: FakeRouter) -> None:
    command = [sys.executable, "-m", "cli.main", "top", "--interval", "0.1", "--target", router.address]
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as top:
        assert top.stdout is not None
        assert top.stderr is not None
        seen = 0
        while seen < 2:
            seen += b"3 queued" in top.stdout.readline()
        top.stdout.close()
        assert top.stderr.read() == b""


def _read_until(terminal: int, wanted: bytes) -> None:
    seen, deadline = b"", time.monotonic() + 30
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 65536)
