"""The stream of a router to a worker: each message takes its time, and each side learns of the end by itself."""

import random
from collections import deque

from router.cluster.worker import Worker
from router.cluster.worker_faults import check
from tests.router.models import VOCAB_SIZE
from tests.simulation.host import Host
from tests.simulation.router_side import RouterSide
from tests.simulation.traffic import Traffic
from twostroke.v1 import worker_pb2 as pb


class Link:
    """
    Attributes:
        router_open, worker_open: the side has not learnt of the end.
    """

    def __init__(self, router: RouterSide, host: Host, traffic: Traffic, rng: random.Random) -> None:
        self.router = router
        self.host = host
        self.worker = Worker(host.address, host.parts.hello, router.circuits[host.address])
        self.router_open = self.worker_open = True
        self._connection, self._unsent = host.wire.connect()
        self._to_router: deque[bytes] = deque()
        self._to_worker: deque[bytes] = deque()
        self._traffic = traffic
        self._rng = rng

    @property
    def over(self) -> bool:
        return not (self.router_open or self.worker_open)

    @property
    def at_rest(self) -> bool:
        """Nothing is under way, not even the news of its end."""
        waiting = self._unsent.ready.is_set() or self._outbox_ready or self._to_router or self._to_worker
        return self.router_open and self.worker_open and not waiting

    def close_router(self) -> None:
        if self.router_open:
            self.router_open = False
            self.router.dispatcher.worker_lost(self.worker)

    def close_worker(self) -> None:
        if self.worker_open:
            self.worker_open = False
            if not self.host.dead:
                self.host.wire.disconnect(self._connection)
            if self._rng.random() < 0.5:
                self._to_router.clear()

    async def go_on(self) -> None:
        """Moves some of what waits, from either side into the network and from there to the other side."""
        if self.host.dead:
            self.close_worker()
        while self.worker_open and self._unsent.ready.is_set() and self._rng.random() < 0.7:
            if (said := self._unsent.take()) is None:
                self._unsent.ready.clear()
            else:
                self._to_router.append(said.SerializeToString())
        while self.router_open and self._outbox_ready and self._rng.random() < 0.7:
            self._to_worker.append((await self.worker.outbox.next_message()).SerializeToString())
        while self.router_open and self._to_router and self._rng.random() < 0.6:
            to_router = pb.WorkerMessage.FromString(self._to_router.popleft())
            self._traffic.to_router(to_router)
            check(to_router, VOCAB_SIZE)
            self.router.dispatcher.received(self.worker, to_router)
        while self.worker_open and self._to_worker and self._rng.random() < 0.6:
            to_worker = pb.RouterMessage.FromString(self._to_worker.popleft())
            self._traffic.to_worker(to_worker)
            self.host.wire.put(self._connection, to_worker)
        if not (self.worker_open or self._to_router) and self._rng.random() < 0.5:
            self.close_router()
        if not self.router_open and self._rng.random() < 0.3:
            self.close_worker()

    @property
    def _outbox_ready(self) -> bool:
        return self.worker.outbox._has_messages.is_set()
