"""`twostroke serve`: a whole cluster on this machine, each part a process."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, Any

from cyclopts import Parameter

from cli.children import Child
from cli.readiness import Readiness
from cli.serve_config import ServeConfig
from cli.stopping import STOP_SECONDS, end_command, stop, stop_signals
from common.kv import host_room
from common.model import hub_name, model_files
from common.model.hub_name import HubName
from common.network import listening
from common.network.addresses import ANY_HOST
from common.network.free_port import free_port
from common.probe import probe, service_of_process
from common.security import cluster_secret, pem
from common.security.security_config import SettingsError, TlsConfig
from common.security.tls import channel_credentials
from common.signals import end_in_order
from common.start_error import AddressError
from common.telemetry import logs
from decode_worker.config import DecodeConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from twostroke import Client

POLL_SECONDS = 0.1


def serve(
    *command: Annotated[str, Parameter(show_env_var=False)],
    config: ServeConfig = ServeConfig(),
) -> None:
    """
    Parameters
    ----------
    command
        What to run against the cluster, after --.
    """
    if stray := command[: len(command) - _behind_dashes()]:
        raise SettingsError(
            f"{stray[0]!r} belongs to no flag: the model is named by --model, and a command stands behind --"
        )
    if command and shutil.which(command[0]) is None:
        raise SystemExit(f"twostroke serve: there is no command {command[0]!r}")
    decode_prefills = bool(config.prefill_tokens or config.prefill_overflow_tokens)
    if not (config.prefill_workers or decode_prefills):
        raise SettingsError(
            "with --prefill-workers 0 nobody prefills: let decode workers do it, with --prefill-tokens 1 or more"
        )
    if config.tls_cert and not config.tls_ca:
        raise SettingsError("the parts call one another: with --tls-cert, set --tls-ca to who signed it")
    if (
        config.metrics_port is not None
        and config.metrics_port + config.prefill_workers + config.decode_workers > 65_535
    ):
        raise SettingsError(f"--metrics-port {config.metrics_port}: the workers take the ports after it, up to 65535")
    if config.host_cache_gib:
        host_room.check(config.host_cache_gib, config.prefill_workers + decode_prefills * config.decode_workers)
    listen = _with_port(config.listen)
    listening.check(listen)  # before the model comes, which may take minutes
    config = _downloaded(config)
    target = _reachable(listen)
    with (
        _secret(config) as config,
        stop_signals() as signals,
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
            readiness = Readiness(client, len(workers), partial(_why_silent, router, target, config))
            raise SystemExit(_supervise(cluster, readiness, command, environment, signals))
        except _GivenUp as error:
            stop([[router], workers], STOP_SECONDS, signals)
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise SystemExit(f"twostroke serve: {error}; giving up") from error
        finally:
            stop([[router], workers], (config.drain_seconds or RouterConfig().drain_seconds) + STOP_SECONDS, signals)


def _behind_dashes() -> int:
    """Number of arguments behind --."""
    return len(sys.argv) - 1 - sys.argv.index("--") if "--" in sys.argv else 0


class _GivenUp(Exception):
    """A part died and a restart would not help, or a worker is of no use to the others."""


def _supervise(
    cluster: list[Child],
    readiness: Readiness,
    command: tuple[str, ...],
    environment: dict[str, str],
    signals: list[int],
) -> int:
    """Runs until a signal or the command's end; returns the exit code. Ctrl-C at the terminal reaches the command, too,
    which decides what it means: in `twostroke chat` it only ends an answer."""
    began = time.monotonic()
    model: str | None = None
    running: subprocess.Popen[bytes] | None = None
    try:
        while set(signals) <= {signal.SIGINT} and (running or not signals):
            _restart_the_dead(cluster, ready=model is not None)
            if model is None and (model := _model_if_ready(readiness)) is not None:
                _say(f"ready at {environment['TWOSTROKE_TARGET']} after {time.monotonic() - began:.1f} s: {model}")
                if command:
                    running = _run(command, environment)
            if running and (code := running.poll()) is not None:
                return code if code >= 0 else 128 - code
            time.sleep(POLL_SECONDS)
        if running:
            return end_command(running)
        return 128 + signals[-1] if command else 0  # a command that never ran must not look like one that succeeded
    except _GivenUp:
        if running:
            end_command(running)
        raise


def _run(command: tuple[str, ...], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, env=environment)
    except OSError as error:  # such as a script that does not say what runs it
        raise SystemExit(f"twostroke serve: cannot run {command[0]!r}: {error.strerror}") from error


def _restart_the_dead(cluster: list[Child], ready: bool) -> None:
    for child in cluster:
        if death := child.death():
            if not ready or child.crash_loops:
                raise _GivenUp(f"{child.name} {death}")
            _say(f"{child.name} {death}; starting it again")
            try:
                child.start()
            except AddressError as error:
                raise _GivenUp(str(error)) from error


def _model_if_ready(readiness: Readiness) -> str | None:
    """The model's name once the cluster is ready; until then, says what keeps it from being so."""
    model, problems = readiness.look()
    for problem in problems:
        _say(f"not ready yet: {problem}")
    if model is not None:
        readiness.close()
    elif (lasting := readiness.lasting_problem()) is not None:
        raise _GivenUp(lasting)
    return model


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


def _downloaded(config: ServeConfig) -> ServeConfig:
    """Downloads a model of the hub for all parts, before they start, and names its commit to them: one that dies and is
    started again serves the same, even if there is a newer commit by then."""
    name = hub_name.parse(config.model) if config.model else None
    if name is None:
        return config
    logs.configure(config.log_format or "people")
    end_in_order()  # so that no half of a file is left behind
    directory = model_files.resolve(str(name), weights=config.load_format != "dummy")
    return replace(config, model=str(HubName(name.repository, directory.name)))


@contextmanager
def _secret(config: ServeConfig) -> Iterator[ServeConfig]:
    """With API keys the parts need a cluster secret. If none is set, makes one that lasts as long as the cluster."""
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
        api_key=secret if config.api_keys else None,  # which the router accepts
        tls=channel_credentials(pem.read(config)) or False,
        tls_server_name=config.tls_server_name,
    )


def _why_silent(router: Child, target: str, config: ServeConfig) -> str | None:
    """None if it is this router, and no other, that answers at `target`; else a sentence."""
    assert router.process is not None
    service = service_of_process(router.process.pid)
    problem = probe(target, service, config)
    return problem and problem.replace(f" {service}", "")


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
    return f"{host}:{free_port(host.strip('[]'))}"


def _reachable(address: str) -> str:
    """Where processes of this machine can call what listens at `address`."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ANY_HOST else address


def _say(text: str) -> None:
    with suppress(OSError):  # of a full disk, or a reader that is gone
        print(f"twostroke serve: {text}", file=sys.stderr, flush=True)
