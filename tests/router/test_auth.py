"""Who is served: API keys, certificates and the cluster's secret at the router's port."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from common.kv.prefix_hash import cache_root
from common.network.free_port import free_port
from common.network.own_address import Way
from common.security import certificates
from common.security.cluster_secret import METADATA_KEY
from common.worker.config import WorkerConfig
from common.worker.worker_peers import worker_peers
from common.worker.worker_service import WorkerService
from router.callers import refusal_log
from router.callers.api_keys import make
from tests import health
from tests.certificates import Signed, sign
from tests.router.cluster import PROMPT, Cluster, cluster, eventually, expected, request
from tests.router.fake_worker import DECODE, PREFILL, FakeWorker, Script
from twostroke import AsyncClient, InvalidArgument, Overloaded, Unauthenticated, Unavailable
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import worker_pb2, worker_pb2_grpc

SECRET = "0123456789abcdef"


class Keys:
    """A keys file, and the keys in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def add(self, name: str, **settings: int | str) -> str:
        key, lines = make(name)
        with self.path.open("a") as file:
            file.write(lines + "".join(f"{setting} = {value!r}\n" for setting, value in settings.items()))
        return key


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.toml")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text(SECRET)
    return tmp_path / "secret"


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return sign(tmp_path / "signed")


async def ask(it: Cluster, key: str | None, **options: Any) -> list[int]:
    async with AsyncClient(it.address, api_key=key) as client:
        return list((await client.generate(PROMPT, **{"max_tokens": 4} | options)).token_ids)


# ------------------------------------------------------------ API keys


async def test_a_key_lets_in_and_nothing_else_does(model: Path, keys: Keys) -> None:
    key, other = keys.add("alice"), keys.add("bob")
    async with cluster(model, api_keys=keys.path) as it:
        assert await ask(it, key) == await ask(it, other) == expected(4)
        with pytest.raises(Unauthenticated, match="needs an API key: send the metadata authorization: Bearer KEY"):
            await ask(it, None)
        for wrong in (f"bob.{key.partition('.')[2]}", make("alice")[0], "alice", SECRET):
            with pytest.raises(Unauthenticated, match="the API key is not one of this router's"):
                await ask(it, wrong)
        for method in (it.stub.GenerateStream(request()), it.stub.GetLoad(pb.GetLoadRequest())):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await (method.read() if hasattr(method, "read") else method)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        exported = generate_latest(it.router.metrics.registry).decode()
        assert 'twostroke_calls_total{code="UNAUTHENTICATED",method="Generate"} 5.0' in exported


@pytest.mark.parametrize("authorization", ["Basic KEY", "KEY", "Bearer", "bearer KEY"])
async def test_the_scheme_is_bearer_in_any_case(model: Path, keys: Keys, authorization: str) -> None:
    metadata = (("authorization", authorization.replace("KEY", keys.add("alice"))),)
    async with cluster(model, api_keys=keys.path) as it:
        call = it.stub.Generate(request(), metadata=metadata)
        if authorization.startswith("bearer"):
            assert list((await call).choices[0].token_ids) == expected(8)
            return
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_is_open(model: Path, keys: Keys) -> None:
    async with cluster(model, api_keys=keys.path) as it:
        assert await health.check(it.channel) == health_pb2.HealthCheckResponse.SERVING


async def test_logs_name_the_caller_and_neither_key_nor_prompt(
    model: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    key = keys.add("alice")
    with capture_logs() as logs:
        async with cluster(model, api_keys=keys.path) as it, AsyncClient(it.address, api_key=key) as client:
            answer = await client.generate("the quick brown fox", max_tokens=4, request_id="mine")
            with pytest.raises(Unauthenticated):
                await ask(it, f"{key}x")
    assert {"call refused", "answered"} <= {entry["event"] for entry in logs}
    written = repr(logs) + "".join(capsys.readouterr())
    for kept in (key, key.partition(".")[2], "quick", repr(answer.token_ids), answer.text):
        assert kept not in written


async def test_refused_calls_do_not_fill_the_log(model: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    key = keys.add("alice", requests_per_minute=1)
    monkeypatch.setattr(refusal_log, "PAUSE_SECONDS", 1e6)

    def lines(logs: Sequence[Any]) -> list[tuple[str, int]]:
        told = [entry for entry in logs if entry["event"] == "call refused"]
        return [(entry["code"], entry.get("left_out", 0)) for entry in told]

    async def refused(given: str | None) -> None:
        with pytest.raises((Unauthenticated, Overloaded)):
            await ask(it, given)

    async with cluster(model, api_keys=keys.path) as it:
        await ask(it, key)
        with capture_logs() as logs:
            for given in ("wrong", "wrong", "also wrong", key, key):
                await refused(given)
            assert lines(logs) == [("UNAUTHENTICATED", 0), ("RESOURCE_EXHAUSTED", 0)]
            monkeypatch.setattr(refusal_log, "PAUSE_SECONDS", 0.0)
            await refused("wrong")
            await refused(key)
            assert lines(logs)[2:] == [("UNAUTHENTICATED", 2), ("RESOURCE_EXHAUSTED", 1)]
        exported = generate_latest(it.router.metrics.registry).decode()
        assert 'twostroke_calls_total{code="UNAUTHENTICATED",method="Generate"} 4.0' in exported


async def test_a_request_too_many_is_told_which_limit(model: Path, keys: Keys) -> None:
    key, other = keys.add("alice", requests_per_minute=2), keys.add("bob")
    async with cluster(model, api_keys=keys.path) as it:
        await ask(it, key)
        await ask(it, key)
        with pytest.raises(Overloaded, match="'alice' may make 2 requests per minute; try again in"):
            await ask(it, key)
        await ask(it, other)


async def test_concurrent_requests_come_home_however_they_end(model: Path, keys: Keys) -> None:
    key = keys.add("alice", concurrent_requests=2)
    async with (
        cluster(model, api_keys=keys.path, decodes=[Script(step_seconds=0.01)]) as it,
        AsyncClient(it.address, api_key=key) as client,
    ):
        for _ in range(3):  # left by the client in the middle
            async for _piece in client.stream(PROMPT, max_tokens=1000, n=2):
                with pytest.raises(Overloaded, match="'alice' may have 2 concurrent requests, and has 2"):
                    await ask(it, key)
                break
            await eventually(it.nothing_held)
        with pytest.raises(InvalidArgument, match="n: 3 answers are more than the 2"):
            await ask(it, key, n=3)
        assert await ask(it, key, n=2) == expected(4)


async def test_tokens_of_prompt_and_answer_count(model: Path, keys: Keys) -> None:
    key = keys.add("alice", tokens_per_minute=len(PROMPT) + 5)
    async with cluster(model, api_keys=keys.path) as it:
        await ask(it, key, max_tokens=4)  # one token is left
        await ask(it, key, max_tokens=4)
        with pytest.raises(Overloaded, match="'alice' may use 25 tokens per minute; try again in"):
            await ask(it, key)


# ------------------------------------------------------------ prefix caches


async def roots(it: Cluster, key: str, **options: Any) -> bytes:
    await ask(it, key, **options)
    return it.prefills[0].prefills[-1].sequence.cache_root


async def test_keys_share_no_prefixes_unless_told_to(model: Path, keys: Keys) -> None:
    alice, bob = keys.add("alice"), keys.add("bob")
    carol, dave = keys.add("carol", cache_group="team"), keys.add("dave", cache_group="team")
    async with cluster(model, api_keys=keys.path) as it:
        own = [await roots(it, key) for key in (alice, bob, carol)]
        assert len({*own, cache_root("f" * 32, "")}) == 4
        assert await roots(it, alice) == own[0]
        assert await roots(it, dave) == own[2]
        assert await roots(it, carol, cache_salt="salt") == await roots(it, dave, cache_salt="salt") != own[2]
        assert await roots(it, bob, cache_salt="alice\0") != own[0]


# ------------------------------------------------------------ workers


async def register(it: Cluster, worker: FakeWorker, secret: str | None) -> None:
    message = worker_pb2.RegisterRequest(address=worker.address, instance=worker.instance, role=worker.role)
    metadata = () if secret is None else ((METADATA_KEY, secret),)
    await worker_pb2_grpc.RegistryStub(it.channel).Register(message, metadata=metadata, timeout=5)


async def test_only_workers_with_the_secret_register(model: Path, secret: Path) -> None:
    async with cluster(model, prefills=[], decodes=[], cluster_secret_file=secret) as it:
        it.decodes.append(worker := FakeWorker(DECODE))
        await worker.start()
        for wrong in (None, "", SECRET + "x"):
            with pytest.raises(grpc.aio.AioRpcError, match="set --cluster-secret-file on the worker") as refused:
                await register(it, worker, wrong)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert not it.router.dispatcher.workers.all()
        await register(it, worker, SECRET)
        await eventually(lambda: len(it.router.dispatcher.workers.all()) == 1)


async def test_a_wrong_secret_is_told_of_where_something_else_was_wrong_before(
    model: Path, secret: Path, worker: Callable[..., WorkerService], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts start in any order: there is always something else first."""
    tries = 0

    async def later(*_: object) -> Way:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise OSError("Name or service not known")
        return Way("127.0.0.1", True)

    def told(logs: Sequence[Any], sentence: str) -> bool:
        return any("trying on" in entry["event"] and sentence in str(entry) for entry in logs)

    monkeypatch.setattr("common.worker.registration.way_to", later)
    with capture_logs() as logs:
        async with cluster(model, prefills=[], decodes=[], ready=False, cluster_secret_file=secret) as it:
            await asyncio.to_thread(worker, DECODE, router=(it.address,))
            await eventually(lambda: told(logs, "Name or service not known"))
            await eventually(lambda: told(logs, "set --cluster-secret-file on the worker"))
        async with cluster(model, prefills=[], decodes=[], ready=False) as it:
            address = f"127.0.0.1:{free_port()}"
            it.router.registry._keep_link((address, DECODE))
            await eventually(lambda: told(logs, "onnection refused"))
            await asyncio.to_thread(worker, DECODE, listen=address, cluster_secret_file=secret)
            await eventually(lambda: told(logs, "set --cluster-secret-file on the router"), seconds=10)


async def test_with_api_keys_and_no_secret_nobody_registers(model: Path, keys: Keys) -> None:
    """Who may register is sent prompts, of all callers."""
    key = keys.add("alice")
    async with cluster(model, api_keys=keys.path) as it:
        with pytest.raises(grpc.aio.AioRpcError, match="set --cluster-secret-file on the router and its workers"):
            await register(it, it.decodes[0], SECRET)
        assert await ask(it, key) == expected(4)


async def test_the_secret_opens_what_operators_ask(model: Path, keys: Keys, secret: Path) -> None:
    async with (
        cluster(model, api_keys=keys.path, cluster_secret_file=secret) as it,
        AsyncClient(it.address, api_key=SECRET) as client,
    ):
        assert len((await client.load()).workers) == 2


# ------------------------------------------------------------ TLS


@pytest.fixture
def worker() -> Iterator[Callable[..., WorkerService]]:
    """Starts the real service of a worker, which registers at a router; no engine is behind it."""
    started: list[WorkerService] = []

    def start(role: "pb.WorkerRole.ValueType", **settings: Any) -> WorkerService:
        config = WorkerConfig(**settings)
        started.append(WorkerService(FakeWorker(role).hello, config, worker_peers(config)))
        return started[-1]

    yield start
    for service in started:
        service.stop()


async def test_a_client_calls_over_tls(model: Path, signed: Signed, tmp_path: Path) -> None:
    async with cluster(model, tls_cert=signed.cert, tls_key=signed.key) as it:
        async with AsyncClient(it.address, tls=signed.channel_credentials()) as client:
            assert (await client.generate(PROMPT, max_tokens=4)).token_ids == tuple(expected(4))
        for tls in (sign(tmp_path / "stranger").channel_credentials(), True, False):
            async with AsyncClient(it.address, tls=tls) as client:
                with pytest.raises(Unavailable):
                    await client.generate(PROMPT, max_tokens=4)


async def test_a_client_without_a_certificate_is_not_served_where_one_is_asked_for(model: Path, signed: Signed) -> None:
    async with cluster(model, tls_cert=signed.cert, tls_key=signed.key, tls_client_ca=signed.ca) as it:
        async with AsyncClient(it.address, tls=signed.channel_credentials(own=True)) as client:
            assert (await client.generate(PROMPT, max_tokens=4)).token_ids == tuple(expected(4))
        async with AsyncClient(it.address, tls=signed.channel_credentials()) as client:
            with pytest.raises(Unavailable):
                await client.generate(PROMPT, max_tokens=4)


async def test_parts_find_one_another_over_mutual_tls(
    model: Path, tmp_path: Path, worker: Callable[..., WorkerService]
) -> None:
    """By a name that is not where they are, as in containers."""
    signed = sign(tmp_path / "named", "cluster.internal")
    mutual: dict[str, Any] = {
        "tls_ca": signed.ca,
        "tls_cert": signed.cert,
        "tls_key": signed.key,
        "tls_client_ca": signed.ca,
    }
    mutual["tls_server_name"] = "cluster.internal"

    def connected(service: WorkerService) -> bool:
        return bool(service.connections)

    async with cluster(model, prefills=[], decodes=[], **mutual) as it:
        for role in (PREFILL, DECODE):
            service = await asyncio.to_thread(worker, role, router=(it.address,), **mutual)
            await eventually(partial(connected, service))
            for connection in service.connections:
                service.outgoing(connection).load.ready = True
            service.flush()
        await eventually(lambda: len(it.router.dispatcher.workers.all()) == 2)
        credentials = signed.channel_credentials(own=True)
        async with AsyncClient(it.address, tls=credentials, tls_server_name="cluster.internal") as client:
            assert {load.role for load in (await client.load()).workers} == {PREFILL, DECODE}
        async with AsyncClient(it.address, tls=credentials) as client:
            with pytest.raises(Unavailable):
                await client.load()


async def test_a_renewed_certificate_ends_no_answer(
    model: Path, signed: Signed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "LOOK_SECONDS", 0.0)
    of_before, renewed = signed.channel_credentials(), sign(tmp_path / "renewed")
    async with (
        cluster(model, decodes=[Script(step_seconds=0.01)], tls_cert=signed.cert, tls_key=signed.key) as it,
        AsyncClient(it.address, tls=of_before) as client,
    ):
        answer, tokens = client.stream(PROMPT, max_tokens=100), list[int]()
        async for piece in answer:
            tokens += piece.token_ids
            if len(tokens) == 1:
                signed.become(renewed)
                async with AsyncClient(it.address, tls=renewed.channel_credentials()) as other:
                    assert (await other.generate(PROMPT, max_tokens=4)).token_ids == tuple(expected(4))
                async with AsyncClient(it.address, tls=of_before) as other:
                    with pytest.raises(Unavailable):
                        await other.generate(PROMPT, max_tokens=4)
        assert tokens == expected(100)


async def test_parts_go_on_with_renewed_certificates(
    model: Path,
    signed: Signed,
    tmp_path: Path,
    worker: Callable[..., WorkerService],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(certificates, "LOOK_SECONDS", 0.0)
    mutual = {"tls_ca": signed.ca, "tls_cert": signed.cert, "tls_key": signed.key, "tls_client_ca": signed.ca}
    async with cluster(model, prefills=[], decodes=[], ready=False, **mutual) as it:
        first = await asyncio.to_thread(worker, DECODE, router=(it.address,), **mutual)
        await eventually(lambda: first.connections == (0,))
        first.outgoing(0).load.ready = True
        first.flush()
        await eventually(lambda: len(it.router.dispatcher.workers.all()) == 1)
        signed.become(sign(tmp_path / "renewed"))
        second = await asyncio.to_thread(worker, PREFILL, router=(it.address,), **mutual)
        await eventually(lambda: second.connections == (0,))
        assert first.connections == (0,)
        assert len(it.router.dispatcher.workers.all()) == 1
        # The router takes the first one for restarted, and connects to it anew.
        it.router.registry.register(worker_pb2.RegisterRequest(address=first.address, instance="new", role=DECODE))
        await eventually(lambda: first.connections == (1,))


async def test_a_router_with_another_authority_gets_no_worker(
    model: Path, signed: Signed, tmp_path: Path, worker: Callable[..., WorkerService]
) -> None:
    other = sign(tmp_path / "other")
    service = await asyncio.to_thread(worker, DECODE, tls_cert=other.cert, tls_key=other.key)
    with capture_logs() as logs:
        async with cluster(model, prefills=[], decodes=[], ready=False, tls_ca=signed.ca) as it:
            it.router.registry.register(worker_pb2.RegisterRequest(address=service.address, role=DECODE))
            await eventually(lambda: any(entry["event"] == "no worker yet; trying on" for entry in logs))
            assert not it.router.dispatcher.workers.all()
