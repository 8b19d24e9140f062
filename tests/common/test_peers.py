"""Whom a worker lets in, and where it refuses to listen. Real gRPC on loopback, no model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from common.network import peers
from common.probe import main, probe
from common.security import certificates, cluster_secret
from common.security.security_config import SecurityConfig, SettingsError, TlsConfig
from common.worker.config import WorkerConfig
from common.worker.worker_peers import worker_peers
from common.worker.worker_service import WorkerService
from tests import health
from tests.certificates import Signed, sign
from twostroke.v1 import inference_pb2, worker_pb2, worker_pb2_grpc

SECRET = "0123456789abcdef"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    return tmp_path / "secret"


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return sign(tmp_path / "signed")


@contextmanager
def worker(**settings: Any) -> Iterator[str]:
    config = WorkerConfig(**settings)
    hello = worker_pb2.WorkerHello(instance="worker", role=inference_pb2.WORKER_ROLE_DECODE)
    service = WorkerService(hello, config, worker_peers(config))
    try:
        service.set_serving(True)
        yield service.address
    finally:
        service.stop()


def connect(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    metadata: tuple[tuple[str, str], ...] = (),
) -> str:
    """The name of the worker's instance; raises what gRPC raises."""
    channel = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
    with channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        hello = worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(router="r"))
        answers = stub.Connect(iter([hello]), metadata=metadata, timeout=5)
        instance = next(answers).hello.instance
        answers.cancel()
        return instance


def test_a_worker_with_a_secret_lets_in_who_has_it(secret: Path) -> None:
    with worker(cluster_secret_file=secret) as address:
        assert connect(address, metadata=((cluster_secret.METADATA_KEY, SECRET),)) == "worker"
        assert probe(address, "") is None


@pytest.mark.parametrize("given", [None, "", "0123456789abcdeX", SECRET + "x", SECRET[:-1]])
def test_a_worker_with_a_secret_refuses_who_has_not(secret: Path, given: str | None) -> None:
    metadata = () if given is None else ((cluster_secret.METADATA_KEY, given),)
    with worker(cluster_secret_file=secret) as address, pytest.raises(grpc.RpcError) as refused:
        connect(address, metadata=metadata)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "--cluster-secret-file" in (refused.value.details() or "")


def test_a_worker_with_mutual_tls_lets_in_who_its_authority_signed(signed: Signed, tmp_path: Path) -> None:
    stranger = sign(tmp_path / "stranger")
    with worker(tls_cert=signed.cert, tls_key=signed.key, tls_client_ca=signed.ca) as address:
        assert connect(address, signed.channel_credentials(own=True)) == "worker"
        shows_other = grpc.ssl_channel_credentials(
            signed.ca.read_bytes(), stranger.key.read_bytes(), stranger.cert.read_bytes()
        )
        for credentials in (None, signed.channel_credentials(), shows_other, stranger.channel_credentials()):
            with pytest.raises(grpc.RpcError) as refused:
                connect(address, credentials)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        complaint = probe(address, "", TlsConfig(tls_ca=signed.ca))
        assert complaint is not None
        assert "UNAVAILABLE" in complaint
        assert probe(address, "", TlsConfig(tls_ca=signed.ca, tls_cert=signed.cert, tls_key=signed.key)) is None


async def test_a_part_calls_with_renewed_files(signed: Signed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "LOOK_SECONDS", 0.0)
    mine = sign(tmp_path / "mine")
    part = peers.Peers.of(SecurityConfig(tls_ca=mine.ca, tls_cert=mine.cert, tls_key=mine.key))

    async def asked(address: str) -> int:
        async with part.channel(address, ()) as channel:
            return await health.check(channel, timeout=5)

    with worker(tls_cert=signed.cert, tls_key=signed.key, tls_client_ca=signed.ca) as address:
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await asked(address)
        mine.become(signed)
        assert await asked(address) == health_pb2.HealthCheckResponse.SERVING


def test_the_health_check_has_its_settings_from_the_environment(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker(tls_cert=signed.cert, tls_key=signed.key) as address:
        monkeypatch.setattr("sys.argv", ["probe", address])
        for name, value, code in (
            ("TWOSTROKE_TLS_CERT", str(signed.cert), "--tls-cert and --tls-key belong together: set both or none"),
            ("TWOSTROKE_TLS_KEY", str(signed.key), f"{address}: UNAVAILABLE"),
            ("TWOSTROKE_TLS_CA", str(signed.ca), None),
            ("TWOSTROKE_TLS_SERVER_NAME", "another", f"{address}: UNAVAILABLE"),
        ):
            monkeypatch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == code or str(ended.value.code).startswith(str(code))


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", ":1", "192.0.2.1:1", "somewhere:1"])
def test_a_worker_that_anyone_could_use_does_not_start(listen: str, secret: Path, signed: Signed) -> None:
    with pytest.raises(SettingsError, match=r"set --cluster-secret-file .* set --insecure"):
        worker_peers(WorkerConfig(listen=listen))
    with pytest.raises(SettingsError, match="set --cluster-secret-file"):  # TLS alone keeps nobody out
        worker_peers(WorkerConfig(listen=listen, tls_cert=signed.cert, tls_key=signed.key))
    assert worker_peers(WorkerConfig(listen=listen, cluster_secret_file=secret)).secret == SECRET
    mutual = WorkerConfig(listen=listen, tls_cert=signed.cert, tls_key=signed.key, tls_client_ca=signed.ca)
    assert worker_peers(mutual).certificates.now().client_ca == signed.ca.read_bytes()
    assert worker_peers(WorkerConfig(listen=listen, insecure=True)).secret is None


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.8.8.8:1", "localhost:1", "[::1]:1", "unix:/run/worker"])
def test_where_only_this_machine_comes_nothing_is_needed(listen: str) -> None:
    assert worker_peers(WorkerConfig(listen=listen)).secret is None


@pytest.mark.parametrize("content", ["", "short", "two lines of\nsixteen or more", "schlüsselschlüssel"])
def test_a_secret_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "secret").write_text(content)
    with pytest.raises(SettingsError, match="openssl rand -hex 32"):
        cluster_secret.read(tmp_path / "secret")


def test_a_secret_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--cluster-secret-file: cannot read .*nowhere"):
        cluster_secret.read(tmp_path / "nowhere")
