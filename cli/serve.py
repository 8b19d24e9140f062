"""`twostroke serve`: a whole cluster on this machine, each part a process."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from types import FrameType
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, Port, PositiveFloat, PositiveInt

from cli.children import Child
from cli.readiness import Readiness
from common import cluster_secret, listening, pem
from common.addresses import ANY_HOST, Listen
from common.probe import probe, service_of_process
from common.security_config import SecurityConfig, SettingsError, TlsConfig
from common.start_error import AddressError
from common.tls import channel_credentials
from decode_worker.config import DecodeConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig, Silence
from twostroke import Client

POLL_SECONDS = 0.1
STOP_SECONDS = 5.0
HURRY_SECONDS = 3.0


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class ServeConfig(SecurityConfig):
    """What `serve` passes on: to each part, the flags that it knows by the same name and that are set."""

    prefill_workers: NonNegativeInt = 1
    """Number of prefill workers. 0: the decode workers prefill, which --prefill-tokens must allow."""

    decode_workers: PositiveInt = 1
    """Number of decode workers."""

    devices: tuple[str, ...] = ("auto",)
    """Devices of the workers, prefill workers first, in turn: cpu, cuda or cuda:N."""

    listen: Listen = "127.0.0.1:8600"
    """Address to serve at, host:port. Port 0 picks a free one."""

    api_keys: Path | None = None
    """File of the callers' API keys, as `twostroke key` makes them. Set: nobody is served without one."""

    model: str | None = None
    """Model to serve: a local Hugging Face directory. Not set: the embedded SmolLM2-135M-Instruct."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Type of weights and KV. auto: the model's own on a GPU, float32 on a CPU."""

    load_format: Literal["auto", "dummy"] | None = None
    """dummy: random weights for the model's config.json, for benchmarks."""

    block_size: PositiveInt | None = None
    """Tokens in a KV block."""

    num_blocks: PositiveInt | None = None
    """KV blocks of each worker. Not set: as many as fit the memory that is free."""

    max_length: PositiveInt | None = None
    """Tokens of the longest sequence, prompt and output together. Not set: the model's context length."""

    max_batch_tokens: PositiveInt | None = None
    """Most tokens in one forward pass of a prefill worker."""

    lease_seconds: PositiveFloat | None = None
    """Seconds that a prefill worker holds a finished prompt's blocks for a decode worker."""

    max_batch: PositiveInt | None = None
    """Most sequences that a decode worker decodes together."""

    prefill_tokens: NonNegativeInt | None = None
    """Prompts with at most this many tokens uncached on the decode worker are prefilled there, without a hand-over."""

    prefill_overflow_tokens: NonNegativeInt | None = None
    """Prompts with at most this many uncached tokens are prefilled there while all prefill workers are busy."""

    prefill_chunk_tokens: PositiveInt | None = None
    """Most tokens of prompts that a decode worker computes between two decode steps."""

    headroom_tokens: NonNegativeInt | None = None
    """Room for output that an attempt reserves on a decode worker, in tokens; doubled with each preemption."""

    max_queue: PositiveInt | None = None
    """Most requests that wait for a worker."""

    max_resumes: NonNegativeInt | None = None
    """Times that a request may lose a worker or its KV and go on."""

    worker_grace: NonNegativeFloat = 30.0
    """Seconds that requests wait for a worker of a role that has none: longer than one takes that is started again."""

    worker_silence_seconds: Silence | None = None
    """Seconds without a word from a worker's engine after which its requests go on elsewhere."""

    drain_seconds: NonNegativeFloat | None = None
    """Seconds that running requests get to finish after Ctrl-C."""

    transport: Literal["auto", "shm", "cuda_ipc"] | None = None
    """How KV goes from prefill to decode workers. auto: cuda_ipc on a GPU, shm on a CPU."""

    threads: PositiveInt | None = None
    """CPU threads of each worker."""

    metrics_port: Port | None = None
    """Port of the router's Prometheus metrics; the workers take those after it. Not set: none are served."""

    otlp_endpoint: str | None = None
    """OpenTelemetry collector that traces go to, over OTLP's gRPC: http://HOST:4317, or https. Not set: no traces."""

    log_format: Literal["people", "json"] | None = None
    """How log lines look."""


def serve(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True, show_env_var=False)],
    config: ServeConfig = ServeConfig(),
) -> None:
    """
    Parameters
    ----------
    command
        What to run against the cluster, after --.
    """
    if command and shutil.which(command[0]) is None:
        raise SystemExit(f"twostroke serve: there is no command {command[0]!r}")
    if not (config.prefill_workers or config.prefill_tokens or config.prefill_overflow_tokens):
        raise SettingsError(
            "with --prefill-workers 0 nobody prefills: let decode workers do it, with --prefill-tokens 1 or more"
        )
    if config.tls_cert and not config.tls_ca:
        raise SettingsError("the parts call one another: with --tls-cert, set --tls-ca to who signed it")
    listen = _with_port(config.listen)
    target = _reachable(listen)
    with (
        _secret(config) as config,
        _stop_signals() as signals,
        _client(config, target) as client,
        TemporaryFile() as log,
    ):
        router, *workers = cluster = _cluster(config, listen)
        try:
            for child in cluster:
                if command:  # whose own output log lines would break into
                    child.output = log
                child.start()
            environment = os.environ | _tls_environment(config) | {"TWOSTROKE_TARGET": target}
            readiness = Readiness(client, len(workers), partial(_answers, router, target, config))
            raise SystemExit(_supervise(cluster, readiness, command, environment, signals))
        except _GivenUp as error:
            _stop([[router], workers], STOP_SECONDS, signals)
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise SystemExit(f"twostroke serve: {error}; giving up") from error
        finally:
            _stop([[router], workers], (config.drain_seconds or RouterConfig().drain_seconds) + STOP_SECONDS, signals)


class _GivenUp(Exception):
    """A part died, and a new start would not mend it, or a worker is of no use to the others."""


def _supervise(
    cluster: list[Child],
    readiness: Readiness,
    command: tuple[str, ...],
    environment: dict[str, str],
    signals: list[int],
) -> int:
    """Runs until a signal or the command's end; returns the exit code. Ctrl-C at the terminal reaches the command too,
    and what it means is then for the command to say: in `twostroke chat` it ends an answer, and nothing else."""
    began = time.monotonic()
    model: str | None = None
    running: subprocess.Popen[bytes] | None = None
    try:
        while signal.SIGTERM not in signals and (running or not signals):
            for child in cluster:
                if death := child.death():
                    if model is None or child.crash_loops:
                        raise _GivenUp(f"{child.name} {death}")
                    _say(f"{child.name} {death}; starting it again")
                    try:
                        child.start()
                    except AddressError as error:
                        raise _GivenUp(str(error)) from error
            if model is None:
                model, problems = readiness.look()
                for problem in problems:
                    _say(f"not ready yet: {problem}")
                if model is not None:
                    readiness.close()
                    _say(f"ready at {environment['TWOSTROKE_TARGET']} after {time.monotonic() - began:.1f} s: {model}")
                    if command:
                        running = subprocess.Popen(command, env=environment)
                elif (lasting := readiness.lasting_problem()) is not None:
                    raise _GivenUp(lasting)
            if running and (code := running.poll()) is not None:
                return code if code >= 0 else 128 - code
            time.sleep(POLL_SECONDS)
        if running:
            return _end(running)
        return 128 + signals[-1] if command else 0  # the command that never ran must not look like one that did well
    except _GivenUp:
        if running:
            _end(running)
        raise


def _cluster(config: ServeConfig, listen: str) -> list[Child]:
    router = part("router", RouterConfig, config, {"listen": listen})
    router.before_start = partial(listening.check, listen)
    roles = ["prefill"] * config.prefill_workers + ["decode"] * config.decode_workers
    workers = []
    for index, role in enumerate(roles):
        settings: type[PrefillConfig | DecodeConfig] = PrefillConfig if role == "prefill" else DecodeConfig
        own: dict[str, object] = {"listen": "127.0.0.1:0", "router": _reachable(listen)}
        own["device"] = config.devices[index % len(config.devices)]
        if config.metrics_port is not None:
            own["metrics_port"] = config.metrics_port + 1 + index
        workers.append(part(f"{role}_worker", settings, config, own))
    return [router, *workers]


def part(module: str, settings: type[Any], config: ServeConfig, own: dict[str, object]) -> Child:
    known = {field.name for field in fields(settings)}
    passed_on = {field.name: getattr(config, field.name) for field in fields(config) if field.name in known}
    flags = {name: value for name, value in (passed_on | own).items() if value is not None}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return Child(module.replace("_", " "), [sys.executable, "-m", module, *arguments])


@contextmanager
def _secret(config: ServeConfig) -> Iterator[ServeConfig]:
    """With API keys the parts need a secret, and where none is given they get one that lasts as long as they do."""
    if config.api_keys is None or config.cluster_secret_file is not None:
        yield config
        return
    with TemporaryDirectory(prefix="twostroke-") as folder:  # which only this user may enter
        file = Path(folder, "secret")
        file.write_text(secrets.token_hex())
        yield replace(config, cluster_secret_file=file)


def _client(config: ServeConfig, target: str) -> Client:
    secret = cluster_secret.read(config.cluster_secret_file) if config.cluster_secret_file else None
    return Client(
        target,
        api_key=secret if config.api_keys else None,  # the router takes it for one
        tls=channel_credentials(pem.read(config)) or False,
        tls_server_name=config.tls_server_name,
    )


def _answers(router: Child, target: str, config: ServeConfig) -> bool:
    """Whether it is this router that answers at `target`, and no other."""
    assert router.process is not None
    return probe(target, service_of_process(router.process.pid), config) is None


def _tls_environment(config: ServeConfig) -> dict[str, str]:
    """What a `twostroke` command needs to call the cluster as its parts do."""
    settings = {field.name: getattr(config, field.name) for field in fields(TlsConfig)}
    return {f"TWOSTROKE_{name.upper()}": str(value) for name, value in settings.items() if value is not None}


def _with_port(listen: str) -> str:
    """`listen` with port 0 replaced by one that is free: workers must be told the router's port before it runs.

    Raises:
        AddressError: the host is not this machine.
    """
    host, _, port = listen.rpartition(":")
    if port != "0":
        return listen
    listening.check(listen)
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with socket.create_server((host.strip("[]"), 0), family=family) as server:
        return f"{host}:{server.getsockname()[1]}"


def _reachable(address: str) -> str:
    """Where processes of this machine reach what listens at `address`."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ANY_HOST else address


def _stop(stages: Iterable[list[Child]], seconds: float, signals: list[int]) -> None:
    """Stops the router first, so that requests finish or end in order, then the workers; a second signal hurries."""
    received = len(signals)
    for children in stages:
        for child in children:
            child.send(signal.SIGTERM)
        _wait_for(children, seconds, lambda: len(signals) > received)
        # A second SIGTERM ends a part at once, in order: killed, a worker would leave its shared memory behind.
        for child in children:
            child.send(signal.SIGTERM)
        _wait_for(children, HURRY_SECONDS)
        for child in children:
            child.send(signal.SIGKILL)
        for child in children:
            if child.process:
                child.process.wait()


def _wait_for(children: Iterable[Child], seconds: float, hurried: Callable[[], bool] = lambda: False) -> None:
    """Returns when all have ended, when the time is up, or when `hurried` says so."""
    deadline = time.monotonic() + seconds
    while any(child.running for child in children) and time.monotonic() < deadline and not hurried():
        time.sleep(0.02)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of being ended by them."""
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for handled, handler in previous.items():
            signal.signal(handled, handler)


def _end(command: subprocess.Popen[bytes]) -> int:
    """Stops the command and returns its exit code."""
    command.terminate()
    try:
        code = command.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        command.kill()
        code = command.wait()
    return code if code >= 0 else 128 - code


def _say(text: str) -> None:
    print(f"twostroke serve: {text}", file=sys.stderr, flush=True)
