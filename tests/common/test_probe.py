"""The container health check: serving, not serving, and nobody there."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from common.probe import probe


@pytest.fixture
def served() -> Iterator[tuple[health.HealthServicer, str]]:
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_serving_is_no_complaint(served: tuple[health.HealthServicer, str]) -> None:
    servicer, address = served
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    assert probe(address, "") is None


def test_no_proxy_is_asked(served: tuple[health.HealthServicer, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    test_serving_is_no_complaint(served)


def test_not_serving_is_named(served: tuple[health.HealthServicer, str]) -> None:
    servicer, address = served
    servicer.set("part", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert (complaint := probe(address, "part")) is not None
    assert "NOT_SERVING" in complaint


def test_an_unknown_service_and_a_closed_port_are_complaints(served: tuple[health.HealthServicer, str]) -> None:
    _, address = served
    assert "NOT_FOUND" in (probe(address, "nobody") or "")
    assert "UNAVAILABLE" in (probe("127.0.0.1:1", "") or "")
