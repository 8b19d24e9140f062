"""Which address a worker tells a router: real sockets, and a registry that writes down what it is told."""

import asyncio
import queue
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from structlog.testing import capture_logs

from common.network.free_port import free_port
from common.network.own_address import Way, way_to
from common.worker.config import WorkerConfig
from common.worker.worker_peers import worker_peers
from common.worker.worker_service import WorkerService
from twostroke.v1 import inference_pb2, worker_pb2, worker_pb2_grpc


class Registry(worker_pb2_grpc.RegistryServicer):
    def __init__(self) -> None:
        self.told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def Register(
        self, request: worker_pb2.RegisterRequest, context: grpc.ServicerContext
    ) -> worker_pb2.RegisterResponse:
        self.told.put(request.address)
        return worker_pb2.RegisterResponse(interval_ms=100)


@pytest.fixture
def registry() -> Iterator[tuple[Registry, int]]:
    registry = Registry()
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        worker_pb2_grpc.add_RegistryServicer_to_server(registry, server)
        port = server.add_insecure_port("[::]:0")
        server.start()
        yield registry, port
        server.stop(0).wait()


def started(**settings: object) -> WorkerService:
    config = WorkerConfig(insecure=True, **settings)  # type: ignore[arg-type]
    hello = worker_pb2.WorkerHello(instance="worker", role=inference_pb2.WORKER_ROLE_DECODE)
    return WorkerService(hello, config, worker_peers(config))


def own_ip() -> str:
    try:
        way = asyncio.run(way_to("192.0.2.1:1", socket.AF_INET))
    except OSError:
        pytest.skip("this machine has no address but loopback")
    assert not way.same_machine
    return way.host


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_a_router_is_told_the_address_that_leads_to_it(
    listen: str, registry: tuple[Registry, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this machine's name stands for: often for loopback, sometimes for nothing."""
    monkeypatch.setattr(socket, "gethostname", lambda: "no.such.host.invalid")
    for host in ("127.0.0.1", own_ip()):
        service = started(listen=listen, router=(f"{host}:{registry[1]}",))
        try:
            told = registry[0].told.get(timeout=10)
            assert told == f"{host}:{service.address.rpartition(':')[2]}"
            with socket.create_connection((host, int(told.rpartition(":")[2])), timeout=5):
                pass
        finally:
            service.stop()
            while not registry[0].told.empty():
                registry[0].told.get()


def test_each_of_two_routers_is_told_its_own(registry: tuple[Registry, int]) -> None:
    hosts = {"127.0.0.1", own_ip()}
    service = started(listen="0.0.0.0:0", router=tuple(f"{host}:{registry[1]}" for host in hosts))
    try:
        told = {registry[0].told.get(timeout=10).rpartition(":")[0] for _ in range(6)}
        assert told == hosts
    finally:
        service.stop()


def test_a_worker_on_a_socket_tells_its_path(registry: tuple[Registry, int], tmp_path: Path) -> None:
    path = f"unix:{tmp_path}/worker"
    service = started(listen=path, router=(f"127.0.0.1:{registry[1]}",))
    try:
        assert registry[0].told.get(timeout=10) == service.address == path
    finally:
        service.stop()


def test_what_is_advertised_is_told_as_it_is(registry: tuple[Registry, int]) -> None:
    service = started(listen="0.0.0.0:0", advertise="worker.example:1", router=(f"127.0.0.1:{registry[1]}",))
    try:
        assert registry[0].told.get(timeout=10) == "worker.example:1"
    finally:
        service.stop()


@pytest.mark.parametrize(("same_machine", "warnings"), [(True, 0), (False, 1)])
def test_a_worker_says_that_a_router_elsewhere_cannot_reach_it(
    same_machine: bool, warnings: int, registry: tuple[Registry, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def way_to(*_: object) -> Way:
        return Way("10.0.0.1", same_machine)

    monkeypatch.setattr("common.worker.registration.way_to", way_to)
    with capture_logs() as logs:
        service = started(router=(f"127.0.0.1:{registry[1]}",))
        try:
            for _ in range(3):
                assert registry[0].told.get(timeout=10) == service.address
        finally:
            service.stop()
    assert sum("set --listen or --advertise" in entry["event"] for entry in logs) == warnings


def test_a_router_whose_name_is_not_there_yet_is_tried_on(
    registry: tuple[Registry, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    async def later(*_: object) -> Way:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return Way("127.0.0.1", True)

    monkeypatch.setattr("common.worker.registration.way_to", later)
    service = started(listen="0.0.0.0:0", router=(f"127.0.0.1:{registry[1]}",))
    try:
        assert registry[0].told.get(timeout=10).startswith("127.0.0.1:")
    finally:
        service.stop()


def test_why_a_router_cannot_be_called_is_told() -> None:
    with capture_logs() as logs:
        service = started(router=(f"127.0.0.1:{free_port()}",))
        try:
            deadline = time.monotonic() + 10
            while not any("onnection refused" in str(entry.get("detail")) for entry in logs):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            service.stop()


def test_ipv6_addresses_have_brackets() -> None:
    try:
        way = asyncio.run(way_to("[::1]:8600"))
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert way == Way("[::1]", True)
