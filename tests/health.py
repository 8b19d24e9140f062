"""Health checks as clients make them. The stub's methods have no types: its class comes without its attributes."""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


async def check(channel: grpc.aio.Channel, service: str = "", timeout: float | None = None) -> int:
    """The status that is answered."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer: health_pb2.HealthCheckResponse = await stub.Check(
        health_pb2.HealthCheckRequest(service=service), timeout=timeout
    )
    return answer.status
