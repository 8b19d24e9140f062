"""gRPC's health service, whose watchers do not depend on each other."""

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2

Context = grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]


class Health(health.aio.HealthServicer):
    """Replaces the `Watch` of grpcio-health-checking (1.81), in which a watcher that leaves removes the condition that
    the other watchers of its service wait for. They never hear of a change again."""

    _server_status: dict[str, int]  # the library's

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Condition()
        self._ends = False

    async def set(self, service: str, status: int) -> None:
        await super().set(service, status)
        await self._tell()

    async def enter_graceful_shutdown(self) -> None:
        """Says NOT_SERVING from now on, and ends the watches, for which a server that stops would wait."""
        await super().enter_graceful_shutdown()
        self._ends = True
        await self._tell()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        told: int | None = None
        while True:
            status = self._status(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
                continue  # it may have changed meanwhile
            if self._ends:
                return
            async with self._changed:
                if self._status(request.service) == told and not self._ends:
                    await self._changed.wait()

    def _status(self, service: str) -> int:
        return self._server_status.get(service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
