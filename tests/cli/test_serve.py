import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from cli import serve as serve_command
from cli.readiness import Readiness
from cli.serve import _reachable, _with_port, part
from cli.serve_config import ServeConfig
from common.probe import probe, service_of_process
from common.start_error import AddressError
from decode_worker.config import DecodeConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from tests.protos.fake_router import FakeRouter, serving
from twostroke import Client
from twostroke.v1 import inference_pb2 as pb

ROOT = Path(__file__).parents[2]
PARTS = ("router", "prefill_worker", "decode_worker")

TWO_READY = pb.GetLoadResponse(workers=[pb.WorkerLoad(ready=True), pb.WorkerLoad(ready=True)])

# What `serve` decides for its parts.
DECIDED = {"insecure", "listen", "advertise", "router", "prefill", "decode", "device"}


@contextmanager
def serve(
    folder: Path, *command: str, listen: str = "127.0.0.1:0", flags: Sequence[str] = (), **environment: str
) -> Iterator[subprocess.Popen[str]]:
    arguments = [sys.executable, "tests/cli/serve_fakes.py", f"--listen={listen}", f"--model={folder}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"} | environment
    process = subprocess.Popen(
        [*arguments, *flags, *(("--", *command) if command else ())],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_with(process: subprocess.Popen[str], words: str) -> str:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if words in line:
            return line
    raise AssertionError(f"no line with {words!r}, but: {seen}")


def pid_of(folder: Path, name: str) -> int:
    return int((folder / name).read_text())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def taken(host: str, port: int, seconds: float = 30.0) -> socket.socket:
    """Listens there as soon as whoever has the port is gone."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_server((host, port))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::]"])
def test_port_0_becomes_a_free_one_that_the_parts_can_reach(host: str) -> None:
    try:
        listen = _with_port(f"{host}:0")
    except OSError:
        if not host.startswith("["):
            raise
        pytest.skip("this machine has no IPv6")
    assert int(listen.removeprefix(f"{host}:")) > 0
    assert _reachable(listen).startswith("127.0.0.1:" if host in ("0.0.0.0", "[::]") else f"{host}:")


@pytest.mark.parametrize("command", [(), ("echo", "never")])
def test_an_address_that_another_router_has_is_not_used(tmp_path: Path, command: tuple[str, ...]) -> None:
    with serving(FakeRouter(load=TWO_READY)) as other, serve(tmp_path, *command, listen=other.address) as process:
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (1, "")
    assert errors == f"twostroke serve: cannot listen on {other.address}: the port is taken\n"
    assert list(tmp_path.iterdir()) == []  # no part was started


def test_a_taken_address_is_told_before_the_model_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.serve._downloaded", lambda _: pytest.fail("downloaded"))
    with serving(FakeRouter()) as other, pytest.raises(AddressError, match="the port is taken"):
        serve_command.serve(config=ServeConfig(model="org/name", listen=other.address))


def test_no_other_router_tells_that_it_is_ready() -> None:
    with serving(FakeRouter(load=TWO_READY)) as router, Client(router.address) as client:
        assert Readiness(client, 2, lambda: "another").look() == (None, [])
        assert Readiness(client, 2, lambda: None).look() == ("fake", [])
        assert probe(router.address, service_of_process(os.getpid())) is None
        assert probe(router.address, service_of_process(os.getppid())) is not None


def test_a_router_that_cannot_be_called_is_told_of_unless_it_does_not_listen_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = "host:1 process 1: UNAVAILABLE"
    with Client("localhost:1") as client:
        refused = Readiness(client, 2, lambda: f"{where}: Connection refused")
        no_socket = Readiness(client, 2, lambda: f"{where}: unix:/tmp/x: No such file or directory")
        assert no_socket.look() == (None, [])
        broken = Readiness(client, 2, lambda: f"{where}: Verification failed")
        assert refused.look() == (None, [])
        problem = f"the router cannot be called at {where}: Verification failed"
        assert broken.look() == (None, [problem])
        assert broken.look() == (None, [])
        assert broken.lasting_problem() is None
        monkeypatch.setattr("cli.readiness.LASTING_SECONDS", -1.0)
        assert broken.lasting_problem() == problem
        assert refused.lasting_problem() is None


def test_a_router_whose_port_was_taken_is_not_started_again(tmp_path: Path) -> None:
    with serve(tmp_path) as process:
        address = line_with(process, "ready at").partition("ready at ")[2].split()[0]
        process.send_signal(signal.SIGSTOP)
        os.kill(pid_of(tmp_path, "router"), signal.SIGKILL)
        host, _, port = address.rpartition(":")
        with taken(host, int(port)):
            process.send_signal(signal.SIGCONT)
            assert line_with(process, "giving up") == (
                f"twostroke serve: cannot listen on {address}: the port is taken; giving up\n"
            )
            assert process.wait(timeout=30) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ready_when_it_says_so_and_one_signal_stops_all(tmp_path: Path, number: signal.Signals) -> None:
    with serve(tmp_path) as process:
        address = line_with(process, "ready at").partition("ready at ")[2].split()[0]
        with Client(address) as client:
            assert client.generate("Hello").text
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
    assert all((tmp_path / f"{name}-stopped").exists() for name in PARTS)
    assert not any(alive(pid_of(tmp_path, name)) for name in PARTS)


def test_a_command_runs_against_the_cluster(tmp_path: Path) -> None:
    program = "import sys; from cli.main import main; main('generate')"
    command = [sys.executable, "-c", program, "Hello", "--max-tokens=2"]
    with serve(tmp_path, *command) as process:
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert output == "t0 t1 \n"
    assert all((tmp_path / f"{name}-stopped").exists() for name in PARTS)


@pytest.mark.parametrize(("program", "code"), [("exit 7", 7), ("kill -9 $$", 137)])
def test_the_exit_code_is_that_of_the_command(tmp_path: Path, program: str, code: int) -> None:
    with serve(tmp_path, "sh", "-c", program) as process:
        assert process.wait(timeout=30) == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_command_too(tmp_path: Path, number: signal.Signals) -> None:
    with serve(tmp_path, "sh", "-c", f"echo $$ > {tmp_path}/command; exec sleep 60") as process:
        assert eventually(lambda: (tmp_path / "command").exists() and (tmp_path / "command").read_text() != "")
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM  # which the command got
    assert not alive(pid_of(tmp_path, "command"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_never_ran_did_not_do_well(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "problem").write_text("is not ready")  # so that the command has to wait
    with serve(tmp_path, "true") as process:
        line_with(process, "not ready yet")
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number


def test_ctrl_c_is_for_the_command(tmp_path: Path) -> None:
    program = f"trap 'echo cut short; exit 5' INT; echo $$ > {tmp_path}/command; while true; do sleep 0.05; done"
    with serve(tmp_path, "sh", "-c", program) as process:
        assert eventually(lambda: (tmp_path / "command").exists() and (tmp_path / "command").read_text() != "")
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert alive(pid_of(tmp_path, "command"))
        os.kill(pid_of(tmp_path, "command"), signal.SIGINT)
        assert process.communicate(timeout=30)[0] == "cut short\n"
    assert process.returncode == 5


def test_a_command_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo no first line says what runs this")
    script.chmod(0o700)
    with serve(tmp_path, str(script)) as process:
        errors = process.communicate(timeout=30)[1]
    assert errors.splitlines()[1:] == [f"twostroke serve: cannot run '{script}': Exec format error"]
    assert process.returncode == 1
    assert all((tmp_path / f"{name}-stopped").exists() for name in PARTS)


@pytest.mark.parametrize(
    ("setting", "value", "refusal"),
    [
        (
            "PREFILL_WORKERS",
            "0",
            "with --prefill-workers 0 nobody prefills: let decode workers do it, with --prefill-tokens 1 or more",
        ),
        ("METRICS_PORT", "65534", "--metrics-port 65534: the workers take the ports after it, up to 65535"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, setting: str, value: str, refusal: str) -> None:
    with serve(tmp_path, **{f"TWOSTROKE_{setting}": value}) as process:
        assert process.communicate(timeout=30)[1] == f"twostroke serve: {refusal}\n"
    assert process.returncode == 1
    assert not (tmp_path / "router").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "refusal"),
    [
        (("--", "no-such-command"), 1, "there is no command 'no-such-command'"),
        (
            ("org/name",),
            1,
            "'org/name' belongs to no flag: the model is named by --model, and a command stands behind --",
        ),
        (("ls", "--", "ls"), 1, "'ls' belongs to no flag"),
        (("--prefill-worker", "2"), 2, "Did you mean --prefill-workers?"),
    ],
)
def test_what_is_neither_a_flag_nor_a_command(
    tmp_path: Path, arguments: tuple[str, ...], code: int, refusal: str
) -> None:
    with serve(tmp_path, flags=arguments) as process:
        errors = " ".join(process.communicate(timeout=30)[1].replace("│", " ").split())
        assert refusal in errors
    assert process.returncode == code
    assert not (tmp_path / "router").exists()


@pytest.mark.parametrize("name", ["router", "decode_worker"])
def test_a_part_that_dies_is_started_again(tmp_path: Path, name: str) -> None:
    with serve(tmp_path) as process:
        line_with(process, "ready at")
        killed = pid_of(tmp_path, name)
        os.kill(killed, signal.SIGKILL)
        assert "was killed by SIGKILL; starting it again" in line_with(process, name)
        assert eventually(lambda: pid_of(tmp_path, name) != killed)
        assert alive(pid_of(tmp_path, name))


def test_a_crash_loop_ends_it(tmp_path: Path) -> None:
    with serve(tmp_path) as process:
        line_with(process, "ready at")
        (tmp_path / "decode_worker-fails").touch()
        os.kill(pid_of(tmp_path, "decode_worker"), signal.SIGKILL)
        assert "ended with exit code 1; giving up" in line_with(process, "giving up")
        assert process.wait(timeout=30) == 1
    assert (tmp_path / "router-stopped").exists()


@pytest.mark.parametrize("command", [(), ("echo", "never")])
def test_a_part_that_cannot_start_ends_it_at_once(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "prefill_worker-fails").touch()
    with serve(tmp_path, *command) as process:
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (1, "")
    assert "prefill_worker says why" in errors
    assert errors.splitlines()[-1] == "twostroke serve: prefill_worker ended with exit code 1; giving up"


@pytest.mark.parametrize("command", [(), ("echo", "never")])
def test_a_worker_that_cannot_be_used_ends_it_with_the_reason(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "problem").write_text("refused: its dtype is 'bfloat16', and that of host:2 is 'float32'")
    with serve(tmp_path, *command) as process:
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (1, "")
    said = [line.removeprefix("twostroke serve: ") for line in errors.splitlines() if line.startswith("twostroke")]
    problem = "decode worker host:1 refused: its dtype is 'bfloat16', and that of host:2 is 'float32'"
    assert said == [f"not ready yet: {problem}", f"{problem}; giving up"]


def test_log_lines_do_not_break_into_the_command(tmp_path: Path) -> None:
    with serve(tmp_path, "echo", "answer") as process:
        output, errors = process.communicate(timeout=30)
    assert output == "answer\n"
    assert [line for line in errors.splitlines() if not line.startswith("twostroke serve: ready")] == []


def test_it_goes_on_when_nobody_reads_what_it_says(tmp_path: Path) -> None:
    with serve(tmp_path, sys.executable, "-c", "print('done')") as process:
        assert process.stderr is not None
        assert process.stdout is not None
        process.stderr.close()
        assert process.stdout.read() == "done\n"


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_no_part_outlives_it(tmp_path: Path) -> None:
    with serve(tmp_path) as process:
        line_with(process, "ready at")
        process.kill()
        assert eventually(lambda: not any(alive(pid_of(tmp_path, name)) for name in PARTS))


def test_every_setting_of_the_parts_is_a_flag_of_serve() -> None:
    flags = {field.name for field in dataclasses.fields(ServeConfig)}
    for settings in (RouterConfig, PrefillConfig, DecodeConfig):
        assert {field.name for field in dataclasses.fields(settings)} - DECIDED <= flags


def test_flags_are_passed_on_to_who_knows_them() -> None:
    config = ServeConfig(model="m", max_batch=4, max_queue=2, devices=("cuda:1",))
    router = part("router", RouterConfig, config, {"listen": "a:1"})
    worker = part("decode_worker", DecodeConfig, config, {"listen": "b:0", "device": "cuda:1"})
    assert router.command[1:3] == ["-m", "router"]
    assert set(router.command[3:]) == {"--listen=a:1", "--model=m", "--max-queue=2", "--worker-grace=30.0"}
    assert set(worker.command[3:]) == {"--listen=b:0", "--model=m", "--max-batch=4", "--device=cuda:1"}


def test_a_flag_has_the_same_range_as_that_of_the_part() -> None:
    here = get_type_hints(ServeConfig, include_extras=True)
    for settings in (RouterConfig, PrefillConfig, DecodeConfig):
        there = get_type_hints(settings, include_extras=True)
        for name in here.keys() & there.keys():
            assert _set(here[name]) == _set(there[name]), name


def _set(kind: Any) -> tuple[object, ...]:
    """The kind, without the None that stands for not set."""
    return (
        tuple(one for one in get_args(kind) if one is not NoneType)
        if get_origin(kind) in (Union, UnionType)
        else (kind,)
    )
