import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from cli.commands import app
from cli.main import main
from tests.protos.fake_router import FakeRouter, serving
from twostroke.v1 import inference_pb2 as pb

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "TERM": "dumb", "COLUMNS": "300"}
COMMANDS = ("serve", "router", "prefill-worker", "decode-worker", "generate", "chat", "top", "bench")


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with serving(FakeRouter()) as router:
        yield router


def twostroke(*arguments: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", *arguments]
    return subprocess.run(
        command, input=text, env=ENVIRONMENT | environment, cwd=ROOT, check=False, capture_output=True, text=True
    )


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from cli.commands import app; app(['--help'], result_action='return_value');"
        "print('modules:', *sys.modules)"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, check=True, capture_output=True, text=True)
    text, _, modules = run.stdout.partition("modules:")
    assert all(command in text for command in COMMANDS)
    assert set(modules.split()).isdisjoint({"torch", "transformers", "numpy", "grpc", "google.protobuf"})


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_explains_every_flag(command: str) -> None:
    flags = {argument.name for argument in app[command].assemble_argument_collection()}
    flags = {name for name in flags if name.startswith("--")}
    help_text = twostroke(command, "--help").stdout
    assert flags
    for flag in flags:
        assert re.search(rf"{flag}( [A-Z]+)?(\.\.\.)?  +[^│\s]", help_text), flag
        assert f"TWOSTROKE_{flag[2:].replace('-', '_').upper()}]" in help_text


def test_help_has_a_paragraph_for_each_flag_and_those_of_security_last() -> None:
    help_text = twostroke("router", "--help").stdout
    assert "PEM file of this part's certificate and those between it and its authority." in help_text
    assert "serves TLS only; a caller presents it when asked." in help_text  # a new line in the code
    assert max(map(help_text.index, ("--model", "--log-format"))) < min(map(help_text.index, ("--tls-ca", "--cluster")))


@pytest.mark.parametrize("command", [("generate", "Hello"), ("chat",), ("top",), ("bench",)])
def test_an_api_key_that_cannot_be_sent(command: tuple[str, ...]) -> None:
    run = twostroke(*command, TWOSTROKE_API_KEY="alice.k\n")
    assert run.stderr == "twostroke: --api-key: character 7 is '\\n'; only printable ASCII can be sent\n"
    assert run.returncode == 1


def test_generate_streams_the_answer(router: FakeRouter) -> None:
    run = twostroke("generate", "Hello", "--target", router.address, "--max-tokens=3", "--temperature=0", "--stop=x")
    assert (run.stdout, run.returncode) == ("t0 t1 t2 \n", 0)
    (request,) = router.requests
    assert [(message.role, message.content) for message in request.chat.messages] == [("user", "Hello")]
    assert request.sampling.HasField("temperature")
    assert request.stopping.stop == ["x"]
    assert not request.sampling.HasField("seed")


def test_flags_are_environment_variables(router: FakeRouter) -> None:
    run = twostroke("generate", "Hello", TWOSTROKE_TARGET=router.address, TWOSTROKE_MAX_TOKENS="2")
    assert run.stdout == "t0 t1 \n"
    run = twostroke("generate", "Hello", "--max-tokens=1", TWOSTROKE_TARGET=router.address, TWOSTROKE_MAX_TOKENS="2")
    assert run.stdout == "t0 \n"


def test_generate_reads_standard_input(router: FakeRouter) -> None:
    twostroke("generate", "-", "--raw", text="from a pipe", TWOSTROKE_TARGET=router.address)
    twostroke("generate", "-", "--system=Be brief.", text="from a pipe", TWOSTROKE_TARGET=router.address)
    raw, chat = router.requests
    assert raw.text == "from a pipe"
    assert [message.content for message in chat.chat.messages] == ["Be brief.", "from a pipe"]


def test_template_variables(router: FakeRouter) -> None:
    variables = '{"enable_thinking": false}'
    twostroke("generate", "Hello", "--template-variables", variables, TWOSTROKE_TARGET=router.address)
    environment = {"TWOSTROKE_TARGET": router.address, "TWOSTROKE_TEMPLATE_VARIABLES": variables}
    twostroke("generate", "Hello", **environment)
    twostroke("generate", "Hello", "--raw", **environment)
    flag, variable, raw = router.requests
    assert (flag.chat.template_variables, variable.chat.template_variables) == (variables, variables)
    assert raw.text == "Hello"
    for wrong in ("enable_thinking", "[1]"):
        run = twostroke("generate", "Hello", f"--template-variables={wrong}", TWOSTROKE_TARGET=router.address)
        assert run.returncode == 2
        assert "Must be a JSON object" in run.stdout + run.stderr
    assert len(router.requests) == 3


def test_guides(router: FakeRouter, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "object"}')
    twostroke("generate", "Hello", f"--json-schema={file}", TWOSTROKE_TARGET=router.address)
    twostroke("generate", "Hello", "--regex=[a-z]+", TWOSTROKE_TARGET=router.address)
    assert [request.guide for request in router.requests] == [
        pb.Guide(json_schema='{"type": "object"}'),
        pb.Guide(regex="[a-z]+"),
    ]
    twostroke("generate", "Hello", "--choices=yes", "--choices=no", TWOSTROKE_TARGET=router.address)
    assert router.requests.pop().guide == pb.Guide(choices=pb.Guide.Choices(texts=["yes", "no"]))
    two = twostroke("generate", "Hello", f"--json-schema={file}", "--regex=a", TWOSTROKE_TARGET=router.address)
    assert two.returncode == 2
    assert "one of these, and not several: --json-schema, --regex" in two.stderr
    assert len(router.requests) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "It holds no JSON object, and so no JSON schema"),
        (b'{\n"a" 1}', "It is no JSON: line 2, column 5: Expecting ':' delimiter"),
        (b"\xff", "It is no JSON: it is not UTF-8"),
        (None, "It cannot be read: No such file or directory"),
    ],
)
def test_what_is_wrong_with_a_schema_is_said(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CycloptsError, match=re.escape(f"for --json-schema. {said}")):
        app.parse_args(["generate", "Hello", f"--json-schema={file}"], exit_on_error=False, print_error=False)


def test_generate_as_json(router: FakeRouter) -> None:
    run = twostroke("generate", "Hello", "--json", "--max-tokens=2", TWOSTROKE_TARGET=router.address)
    answer = json.loads(run.stdout)
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == ("t0 t1 ", [0, 1], "length")
    assert answer["usage"]["completion_tokens"] == 2


def test_bench_says_at_once_that_it_cannot_write_its_results(router: FakeRouter) -> None:
    for flag in ("--json", "--plot"):
        run = twostroke("bench", f"{flag}=/no/such/folder/run", TWOSTROKE_TARGET=router.address)
        assert run.returncode == 2
        assert "There is no folder /no/such/folder" in run.stdout + run.stderr
    assert router.requests == []


def test_a_misspelt_flag_is_no_prompt(router: FakeRouter) -> None:
    for arguments in (["--jsno"], ["--jsno", "Hello"], ["--temprature=0", "Hello"], ["-x"]):
        run = twostroke("generate", *arguments, TWOSTROKE_TARGET=router.address)
        assert run.returncode == 2
        assert f'Invalid value "{arguments[0]}" for PROMPT. There is no such flag' in run.stdout + run.stderr
    assert router.requests == []
    assert twostroke("generate", "- a list", TWOSTROKE_TARGET=router.address).returncode == 0


def test_generate_says_where_an_answer_was_cut_off(router: FakeRouter) -> None:
    chat = twostroke("generate", "Hello", "--max-tokens=2", TWOSTROKE_TARGET=router.address)
    assert chat.stderr == "twostroke: cut off after 2 tokens; --max-tokens is the limit\n"
    raw = twostroke("generate", "Hello", "--raw", "--max-tokens=2", TWOSTROKE_TARGET=router.address)
    assert raw.stderr == ""


@pytest.mark.parametrize("raw", [(), ("--raw",)])
@pytest.mark.parametrize("json", [(), ("--json",)])
def test_an_answer_has_the_room_that_is_left(router: FakeRouter, raw: tuple[str, ...], json: tuple[str, ...]) -> None:
    router.longest = len("Hello") + 3
    run = twostroke("generate", "Hello", *raw, *json, TWOSTROKE_TARGET=router.address)
    assert (run.returncode, "t0 t1 t2 " in run.stdout) == (0, True), run.stderr
    assert [request.stopping.max_tokens for request in router.requests] == [512, 3]
    if not (raw or json):
        assert run.stderr == "twostroke: cut off after 3 tokens; the context has room for no more\n"


def test_what_was_asked_for_and_does_not_fit_is_an_error(router: FakeRouter) -> None:
    router.longest = 8
    for arguments in (("Hello", "--max-tokens=4"), ("Hello all",)):
        run = twostroke("generate", *arguments, TWOSTROKE_TARGET=router.address)
        assert (run.returncode, run.stderr) == (1, "twostroke: INVALID_ARGUMENT: it does not fit\n")
    assert len(router.requests) == 2


def test_ctrl_c_at_the_start_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_tokens: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.commands.app", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


@pytest.mark.parametrize(("command", "module", "code"), [("generate", "cyclopts", 130), ("decode-worker", "torch", -2)])
def test_ctrl_c_during_an_import_is_quiet(command: str, module: str, code: int) -> None:
    program = (
        "import os, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        f"from cli.main import main; main({command!r})"
    )
    run = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (code, "", "")


def test_output_that_nobody_reads_ends_the_request(router: FakeRouter) -> None:
    router.step_seconds = 0.01
    command = [sys.executable, "-m", "cli.main", "generate", "Hello", "--max-tokens=1000", "--target", router.address]
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.read(3) == b"t0 "
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 128 + signal.SIGPIPE
    assert router.cancelled.wait(timeout=20)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "command", [("generate", "Hello"), ("generate", "Hello", "--json"), ("chat",), ("key", "alice")]
)
def test_output_that_cannot_be_written_is_a_sentence(router: FakeRouter, command: tuple[str, ...]) -> None:
    arguments = [sys.executable, "-m", "cli.main", *command]
    environment = ENVIRONMENT | {"TWOSTROKE_TARGET": router.address}
    with open("/dev/full", "w") as full:
        run = subprocess.run(arguments, env=environment, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.stderr == "twostroke: No space left on device\n"
    assert run.returncode == 1


@pytest.mark.parametrize(
    ("command", "code"),
    [("generate Hello >&-", 0), ("generate - <&-", 2), ("chat <&-", 0), ("bench --requests=1 2>&-", 0)],
)
def test_standard_streams_that_are_closed_are_empty(router: FakeRouter, command: str, code: int) -> None:
    shell = ["sh", "-c", f"exec {sys.executable} -m cli.main {command}"]
    environment = ENVIRONMENT | {"TWOSTROKE_TARGET": router.address}
    run = subprocess.run(shell, env=environment, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr


def test_an_answer_that_does_not_end_in_time_ends_its_line(router: FakeRouter) -> None:
    router.stalls_after = 2
    run = twostroke("generate", "Hello", "--timeout=3", TWOSTROKE_TARGET=router.address)
    assert (run.returncode, run.stdout) == (1, "t0 t1 \n")
    assert run.stderr == "twostroke: DEADLINE_EXCEEDED: no end within --timeout 3 s\n"


def test_nothing_is_not_asked(router: FakeRouter) -> None:
    for arguments in (["generate", ""], ["generate", "-"], ["generate", " \n"], ["generate", "", "--raw"]):
        run = twostroke(*arguments, TWOSTROKE_TARGET=router.address)
        assert (run.returncode, run.stderr) == (2, "twostroke: there is nothing to ask: the prompt is empty\n")
    assert router.requests == []


def test_standard_input_must_be_utf_8(router: FakeRouter) -> None:
    command = [sys.executable, "-m", "cli.main", "generate", "-", "--target", router.address]
    run = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, input=b"\xff\xfe", capture_output=True)
    assert (run.returncode, run.stderr) == (2, b"twostroke: standard input is not UTF-8\n")
    assert router.requests == []


def test_who_has_no_key_is_told_how_to_give_one(router: FakeRouter) -> None:
    router.api_key = "secret"
    run = twostroke("generate", "Hello", TWOSTROKE_TARGET=router.address)
    assert run.stderr == "twostroke: UNAUTHENTICATED: the API key is wrong; set --api-key or TWOSTROKE_API_KEY\n"


def test_errors_are_sentences() -> None:
    run = twostroke("generate", "Hello", "--target=127.0.0.1:1")
    assert run.returncode == 1
    assert run.stderr.startswith("twostroke: UNAVAILABLE: ")
    assert run.stderr.endswith("; start a cluster with `twostroke serve`, or name another router with --target\n")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("command", [("generate", "Hello"), ("chat",), ("top",), ("bench",)])
def test_a_target_that_is_no_address_is_named(command: tuple[str, ...]) -> None:
    with pytest.raises(CycloptsError, match=r'Invalid value "http://localhost:8600" for --target. Must be host:port'):
        app.parse_args([*command, "--target=http://localhost:8600"], exit_on_error=False, print_error=False)
    with pytest.raises(CycloptsError, match=r'Invalid value "localhost:99999" for --target. Must be host:port'):
        app.parse_args([*command, "--target=localhost:99999"], exit_on_error=False, print_error=False)


class Terminal:
    """A program on a terminal of its own: what a person types, and what they see."""

    def __init__(self, *arguments: str, target: str) -> None:
        # pty.fork() would fork a process with gRPC's threads, which may hang before it comes to exec.
        take_it = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self._terminal, its_end = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", take_it, sys.executable, "-m", "cli.main", *arguments],
            stdin=its_end,
            stdout=its_end,
            stderr=its_end,
            env=ENVIRONMENT | {"TWOSTROKE_TARGET": target},
            cwd=ROOT,
            start_new_session=True,
        )
        os.close(its_end)
        self._seen = ""

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def enter(self, line: str) -> None:
        """As a person does: the line, and once it is there, the key. Of both at once readline may keep the key until
        another one comes."""
        self.type(line)
        self.see(line)
        self.type("\n")

    def interrupt(self, words: str) -> None:
        """Ctrl-C until `words` appear: Python's readline sees one that comes while it handles a key with the next."""
        for _ in range(20):
            self.type("\x03")
            with suppress(AssertionError):
                self.see(words, seconds=1)
                return
        raise AssertionError(self._seen)

    def see(self, words: str, seconds: float = 20) -> str:
        """What appeared up to and with `words` since the last time."""
        deadline = time.monotonic() + seconds
        while words not in self._seen:
            assert select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))[0], self._seen
            self._seen += os.read(self._terminal, 4096).decode()
        before, _, self._seen = self._seen.partition(words)
        return before + words

    def exit_code(self) -> int:
        code = self._process.wait(timeout=20)
        os.close(self._terminal)
        return code


def test_chat(router: FakeRouter) -> None:
    flags = ("--system=Be brief.", "--max-tokens=3", '--template-variables={"x": 1}')
    terminal = Terminal("chat", *flags, target=router.address)
    terminal.see("> ")
    terminal.enter("Hello")
    assert "\r\nHm.\r\n\r\nt0 " in terminal.see("t0 ")  # what it thought, and a blank line
    terminal.see("t1 t2 ")
    terminal.see("3 tokens, cut off by --max-tokens")
    terminal.see("> ")

    router.stalls_after = 1
    terminal.enter("again")
    terminal.see("t0 ")
    terminal.type("\x03")  # Ctrl-C: the answer ends, the program does not
    terminal.see("…")
    terminal.see("> ")
    assert router.cancelled.wait(timeout=20)

    router.stalls_after = None
    terminal.type("half a thought")
    terminal.see("half a thought")
    terminal.interrupt("> ")  # at the prompt: a new line
    terminal.enter("and now")
    terminal.see("3 tokens")
    terminal.see("> ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.exit_code() == 0

    *_, last = router.requests
    roles = [message.role for message in last.chat.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [message.content for message in last.chat.messages][1:4] == ["Hello", "t0 t1 t2 ", "again"]
    assert last.chat.messages[4].content.startswith("t0 ")
    assert last.chat.template_variables == '{"x": 1}'


def test_chat_goes_on_when_the_context_is_full(router: FakeRouter) -> None:
    router.longest = 40
    terminal = Terminal("chat", "--system=Be brief.", target=router.address)
    terminal.see("> ")
    terminal.enter("first")
    terminal.see("26 tokens, cut off where the context is full")
    terminal.see("> ")
    terminal.enter("second")
    seen = terminal.see("25 tokens, cut off where the context is full")
    assert "the context is full: the oldest 2 messages are left out from here on" in seen
    terminal.see("> ")
    terminal.enter("a question that alone is longer than the context")
    terminal.see("it does not fit")
    terminal.see("> ")
    terminal.enter("third")
    terminal.see("26 tokens, cut off")
    terminal.see("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    *_, last = router.requests
    assert [message.content for message in last.chat.messages] == ["Be brief.", "third"]


def test_chat_leaves_out_no_more_than_it_must(router: FakeRouter) -> None:
    router.longest = 57
    terminal = Terminal("chat", "--max-tokens=6", target=router.address)
    terminal.see("> ")
    for question, seen in (("first", "6 tokens"), ("second", "6 tokens"), ("third", "the oldest 2 messages")):
        terminal.enter(question)
        terminal.see(seen)
        terminal.see("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    *_, last = router.requests
    answer = "".join(f"t{token} " for token in range(6))
    assert [message.content for message in last.chat.messages] == ["second", answer, "third"]
