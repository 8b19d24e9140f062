"""Models by their names on the hub, downloaded by the real client from a hub of this machine."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.model import hub, hub_name, model_files
from common.model.hub_name import HubName
from common.model.model_error import ModelError
from tests.hub_server import COMMIT, TOKEN, Hub
from tests.router import models

ROOT = Path(__file__).parents[2]
SMALL = ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NOBODY = "http://127.0.0.1:1"
NOT_READ = ["README.md", "consolidated.safetensors", "model.gguf", "modeling_tiny.py", "original/config.json"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "tiny"
    models.write(folder, models.byte_level())
    (folder / "original").mkdir()
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in (*SHARDS, *NOT_READ, "pytorch_model.bin"):
        (folder / name).write_text(f"{name}'s content" * 1000)
    served = Hub(folder)
    with served.serving():
        yield served


def environment(served: Hub, tmp_path: Path, **variables: str) -> dict[str, str]:
    of_this_machine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TWOSTROKE_"))}
    own = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": served.endpoint, "NO_PROXY": "*"}
    return of_this_machine | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"} | own | variables


def start(served: Hub, tmp_path: Path, model: str = "org/tiny", **variables: str) -> str | None:
    """Downloads a model as containers do. Returns what it said where it failed."""
    done = subprocess.run(
        [sys.executable, "-m", "common.model.download"],
        env=environment(served, tmp_path, TWOSTROKE_MODEL=model, **variables),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 or "Traceback" not in done.stderr, done.stderr
    return None if done.returncode == 0 else done.stderr.splitlines()[-1]


def snapshot(tmp_path: Path) -> Path:
    return tmp_path / "home/hub/models--org--tiny/snapshots" / COMMIT


def test_what_is_read_comes_once_and_nothing_else(served: Hub, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as threads:  # two workers of one machine
        assert list(threads.map(lambda _: start(served, tmp_path), range(2))) == [None, None]
    assert sorted(served.given) == sorted([*SMALL, *SHARDS])
    assert (snapshot(tmp_path) / SHARDS[0]).read_bytes() == (served.folder / SHARDS[0]).read_bytes()
    assert start(served, tmp_path) is None
    assert start(served, tmp_path, f"org/tiny@{COMMIT}") is None
    assert start(served, tmp_path, "org/tiny@v1") is None
    assert len(served.given) == len([*SMALL, *SHARDS])


def test_the_single_file_wins_over_an_old_index(served: Hub, tmp_path: Path) -> None:
    """As it does in a local directory."""
    (served.folder / "model.safetensors").write_text("all of it")
    assert start(served, tmp_path) is None
    assert sorted(served.given) == sorted([*SMALL, "model.safetensors"])


def test_a_start_without_the_hub(served: Hub, tmp_path: Path) -> None:
    assert start(served, tmp_path) is None
    served.asked.clear()
    assert start(served, tmp_path, HF_HUB_OFFLINE="1") is None
    assert served.asked == []
    assert start(served, tmp_path, HF_ENDPOINT=NOBODY) is None


def test_a_router_takes_no_weights(served: Hub, tmp_path: Path) -> None:
    arguments = ["-m", "router", "--model=org/tiny", "--listen=127.0.0.1:0"]
    router = subprocess.Popen(
        [sys.executable, *arguments], env=environment(served, tmp_path), cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert router.stderr is not None
    with router:
        line = router.stderr.readline()
        router.kill()
    assert "router listening" in line
    assert sorted(served.given) == SMALL
    assert "HF_HUB_OFFLINE forbids" in (start(served, tmp_path, HF_HUB_OFFLINE="1") or "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, "the architecture GemmaForCausalLM is not s"),
        ({"quantization_config": {"quant_method": "awq"}}, "weights quantized by 'awq' are not supported"),
    ],
)
def test_what_is_not_supported_is_refused_before_its_weights_come(
    change: dict[str, object], words: str, served: Hub, tmp_path: Path
) -> None:
    (served.folder / "config.json").write_text(json.dumps(models.CONFIG | change))
    said = start(served, tmp_path)
    assert said is not None
    assert said.startswith(words)
    assert not {*SHARDS} & {*served.given}


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named_before_the_weights_come(file: str, served: Hub, tmp_path: Path) -> None:
    (served.folder / file).unlink()
    assert f"org/tiny has no {file}" in (start(served, tmp_path) or "")
    assert not {*SHARDS} & {*served.given}


def test_pickled_weights_are_not_read(served: Hub, tmp_path: Path) -> None:
    (served.folder / "model.safetensors.index.json").unlink()
    assert "org/tiny lacks files of weights in the safetensors format" in (start(served, tmp_path) or "")
    assert "pytorch_model.bin" not in served.given


@pytest.mark.parametrize(
    ("model", "variables", "words"),
    [
        ("org/none", {}, "'org/none' is no directory here, and {hub} shows no such model: check the name, and set HF"),
        ("org/tiny@v2", {}, "{hub}/org/tiny has no branch, tag or commit 'v2'"),
        ("org/tiny@" + "4" * 40, {}, "{hub}/org/tiny has no branch, tag or commit '4444"),
        ("org/tiny", {"HF_TOKEN": "hf_wrong"}, "{hub} does not accept the token in HF_TOKEN"),
        ("org/tiny", {"HF_HUB_OFFLINE": "1"}, "org/tiny is not, or not completely, in {home}/hub, and HF_HUB_OFFLINE"),
        ("org/tiny", {"HF_ENDPOINT": NOBODY}, "'org/tiny' is no directory here, and as a model on " + NOBODY),
        ("org/tiny", {"HF_HOME": "/proc/x"}, "cannot keep org/tiny in /proc/x/hub: No such file or directory; HF_HOME"),
        ("or--g/tiny", {}, "'or--g/tiny' is no directory here, and cannot be the name of a model on {hub}"),
        ("./org/tiny", {}, "'./org/tiny' is neither the embedded model SmolLM2-135M-Instruct nor a directory that"),
    ],
)
def test_a_sentence_says_what_is_wrong(
    model: str, variables: dict[str, str], words: str, served: Hub, tmp_path: Path
) -> None:
    said = start(served, tmp_path, model, **variables)
    assert said is not None
    assert said.startswith(words.format(hub=served.endpoint, home=tmp_path / "home"))
    assert served.given == []


def test_gated_models_take_a_token(served: Hub, tmp_path: Path) -> None:
    served.gated = True
    accept = f"accept them at {served.endpoint}/org/tiny, and set HF_TOKEN"
    assert accept in (start(served, tmp_path) or "")
    assert start(served, tmp_path, HF_TOKEN=TOKEN) is None


def test_a_hub_that_fails(served: Hub, tmp_path: Path) -> None:
    served.broken = True
    assert "it cannot be downloaded (Server error '500 Internal Server Error'" in (start(served, tmp_path) or "")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), r"^cannot keep a/b in .*: No space left on device; HF_HOME can name"),
        (RuntimeError("connection reset\nmore"), r"^the download of a/b broke off \(connection reset\); start again"),
    ],
)
def test_a_download_that_breaks_off(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=words):
        model_files.resolve("a/b")


@pytest.mark.parametrize(
    ("arguments", "number", "code"),
    [
        (["cli.main", "serve", "--listen=127.0.0.1:0"], signal.SIGINT, 130),
        (["cli.main", "serve", "--listen=127.0.0.1:0"], signal.SIGTERM, 143),
        (["common.model.download"], signal.SIGTERM, 143),
    ],
)
def test_an_interrupted_download_ends_at_once_and_is_taken_up_again(
    arguments: list[str], number: signal.Signals, code: int, served: Hub, tmp_path: Path
) -> None:
    served.stuck = SHARDS[1]
    variables = environment(served, tmp_path, TWOSTROKE_MODEL="org/tiny")
    with subprocess.Popen(
        [sys.executable, "-m", *arguments], env=variables, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert served.half_sent.wait(30)
            process.send_signal(number)
            assert process.wait(5) == code
        finally:
            process.kill()
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    served.stuck = ""
    served.given.clear()
    assert start(served, tmp_path) is None
    assert served.given == [SHARDS[1]]


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name.parse("Qwen/Qwen3-0.6B") == HubName("Qwen/Qwen3-0.6B")
    assert hub_name.parse("Qwen/Qwen3-0.6B@refs/pr/1") == HubName("Qwen/Qwen3-0.6B", "refs/pr/1")
    assert str(HubName("a/b", "v1")) == "a/b@v1"
    assert hub_name.public_name("a/b@v1") == "a/b"
    for other in (
        "a",
        "a/b/c",
        "/a/b",
        "./a",
        "../a",
        "~a/b",
        "a/b@",
        "a/b@../c",
        "a/b@c/../d",
        "a/b@c//d",
        "a b/c",
        "é/b",
        "a/b\n",
        "",
    ):
        assert hub_name.parse(other) is None, other
        assert hub_name.public_name(other) == other


def test_a_directory_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/tiny").mkdir(parents=True)
    assert hub_name.public_name("org/tiny") == "org/tiny"
    with pytest.raises(ModelError, match=r"^the directory 'org/tiny' has no config\.json$"):
        model_files.resolve("org/tiny")
    (tmp_path / "org/tiny/config.json").write_text("{}")
    assert model_files.resolve("org/tiny") == tmp_path / "org/tiny"
