"""Clusters with a model from the hub."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common.network.free_port import free_port
from tests.cli.test_serve import eventually
from tests.common.test_hub import environment
from tests.e2e.tiny import prompt
from tests.hub_server import COMMIT, Hub
from tests.router import models
from twostroke import Client

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def test_it_comes_once_for_all_parts_and_is_the_same_for_a_worker_elsewhere(tmp_path: Path) -> None:
    folder, target = tmp_path / "tiny", f"127.0.0.1:{free_port()}"
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(LlamaConfig.from_dict(models.CONFIG)).save_pretrained(folder)
    models.write(folder, models.byte_level())
    hub = Hub(folder)
    of_all = ["--model=org/tiny", "--num-blocks=64", "--threads=1"]
    serve = [sys.executable, "-m", "cli.main", "serve", f"--listen={target}", "--devices=cpu", *of_all]
    elsewhere = [sys.executable, "-m", "decode_worker", f"--router={target}", "--device=cpu", *of_all]
    log = tmp_path / "log"
    with (
        hub.serving(),
        log.open("w") as output,
        subprocess.Popen(serve, env=environment(hub, tmp_path), stderr=output) as cluster,
        Client(target, timeout=60) as client,
    ):
        try:
            assert eventually(lambda: f"ready at {target}" in log.read_text(), seconds=60), log.read_text()
            assert client.model().name == "org/tiny"
            assert len(client.generate(prompt(30), max_tokens=4, ignore_eos=True).token_ids) == 4
            assert sorted(hub.given) == sorted({*hub.given})
            assert [call for call in hub.asked if "/revision/" in call] == ["GET /api/models/org/tiny/revision/main"]
            assert f"org/tiny@{COMMIT}" in log.read_text()
            with subprocess.Popen(
                elsewhere, env=environment(hub, tmp_path, HF_HOME=str(tmp_path / "elsewhere")), stderr=output
            ) as worker:
                found = eventually(lambda: sum(it.ready for it in client.load().workers) == 3, seconds=60)
                worker.terminate()
            assert found, log.read_text()
            assert hub.given.count("model.safetensors") == 2
        finally:
            cluster.terminate()
            assert cluster.wait(timeout=30) == 0
