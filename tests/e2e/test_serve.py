"""`twostroke serve` with real parts."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest

from common.network.free_port import free_port
from tests.cli.test_serve import ROOT, eventually
from tests.e2e.tiny import prompt
from tests.router import models
from twostroke import Client, Options

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def child_of(pid: int, module: str) -> int:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if module in Path(f"/proc/{child}/cmdline").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"{pid} has no child that runs {module}")


def test_an_answer_goes_on_when_the_only_decode_worker_was_killed(tmp_path: Path) -> None:
    models.write(tmp_path / "model", models.byte_level())
    target = f"127.0.0.1:{free_port()}"
    flags = [
        f"--listen={target}",
        f"--model={tmp_path / 'model'}",
        "--load-format=dummy",
        "--devices=cpu",
    ]
    options: Options = {"max_tokens": 400, "seed": 7, "ignore_eos": True}
    command = [sys.executable, "-m", "cli.main", "serve", *flags, "--num-blocks=256", "--threads=1"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, env=environment, stderr=output) as serve,
        Client(target, timeout=60) as client,
    ):
        try:
            assert eventually(lambda: "ready at" in log.read_text(), seconds=60), log.read_text()
            undisturbed = client.generate(prompt(30), **options).token_ids
            token_ids: list[int] = []
            for piece in client.stream(prompt(30), **options):
                if not token_ids and piece.token_ids:
                    serve.send_signal(
                        signal.SIGSTOP
                    )  # the start of a model that is not tiny takes longer than this one's
                    Timer(2.0, serve.send_signal, [signal.SIGCONT]).start()
                    os.kill(child_of(serve.pid, "decode_worker"), signal.SIGKILL)
                token_ids += piece.token_ids
            assert piece.finish is not None
            assert piece.finish.usage.resumes == 1
            assert tuple(token_ids) == undisturbed
        finally:
            serve.send_signal(signal.SIGINT)
            assert serve.wait(timeout=30) == 0
