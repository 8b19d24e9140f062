"""How a worker lets routers know where it is."""

import asyncio
import socket
from dataclasses import dataclass

import grpc
import structlog

from common.network.addresses import ANY_HOST, is_unix, with_port
from common.network.grpc_options import PEERS
from common.network.own_address import way_to
from common.network.peers import Peers, only_local
from twostroke.v1 import worker_pb2 as pb
from twostroke.v1 import worker_pb2_grpc

log = structlog.get_logger(__name__)

CHANNEL_OPTIONS = (*PEERS, ("grpc.use_local_subchannel_pool", 1))
CALL_SECONDS = 5.0
RETRY_SECONDS = 0.5
SHORTEST_INTERVAL_MS = 100


@dataclass(frozen=True, slots=True)
class Registration:
    """Registers a worker with routers, from the event loop of its service.

    Args:
        hello: who the worker is.
        peers: how routers are called.
        listen: host:port of the worker's settings.
        port: where it really listens.
        advertise: address from its settings that routers are told instead.
    """

    hello: pb.WorkerHello
    peers: Peers
    listen: str
    port: int
    advertise: str | None

    @property
    def address(self) -> str:
        """Where the worker is reached from this machine, or as its settings say."""
        listen = f"{socket.gethostname()}:0" if self._host in ANY_HOST else self.listen
        return self.advertise or with_port(listen, self.port)

    async def keep(self, router: str) -> None:
        """Registers again and again, without end, so that a router that restarts knows the worker within seconds."""
        request = pb.RegisterRequest(instance=self.hello.instance, role=self.hello.role)
        warned = False
        failures: set[object] = set()  # their kinds since it was last registered: each is logged once
        kind: object
        while True:
            # A new channel for each try: one that failed waits up to two minutes before it looks the name up again.
            async with self.peers.channel(router, CHANNEL_OPTIONS) as channel:
                stub = worker_pb2_grpc.RegistryStub(channel)
                try:
                    request.address, reachable = await self._address_towards(router)
                    if not (reachable or warned):
                        log.warning(
                            "the router is on another machine, and cannot reach this worker at the address that it is "
                            "told: set --listen or --advertise",
                            router=router,
                            address=request.address,
                        )
                        warned = True
                    while True:
                        response = await stub.Register(request, timeout=CALL_SECONDS, metadata=self.peers.metadata)
                        if failures:
                            log.info("registered", router=router)
                        failures.clear()
                        await asyncio.sleep(max(response.interval_ms, SHORTEST_INTERVAL_MS) / 1000)
                except grpc.aio.AioRpcError as error:
                    detail = error.details()
                    kind = error.code(), detail
                except Exception as error:  # of whatever kind: routers would never hear of a worker that says it serves
                    detail = str(error)
                    kind = type(error)
                if kind not in failures:
                    log.warning("cannot register yet; trying on", router=router, detail=detail)
                failures.add(kind)
            await asyncio.sleep(RETRY_SECONDS)

    async def _address_towards(self, router: str) -> tuple[str, bool]:
        """What this router is told, and whether it can reach the worker there."""
        if is_unix(router):
            return self.address, True
        way = await way_to(router, socket.AF_INET if self._host == "0.0.0.0" else socket.AF_UNSPEC)
        from_anywhere = self.advertise is None and self._host in ANY_HOST
        address = f"{way.host}:{self.port}" if from_anywhere else self.address
        return address, way.same_machine or not only_local(address)

    @property
    def _host(self) -> str:
        return self.listen.rpartition(":")[0]
