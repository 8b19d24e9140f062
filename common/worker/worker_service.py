"""The gRPC side of a worker: routers' streams, on a thread of their own, with two queues to the engine's loop.

The engine's loop owns the main thread, the model and the blocks. It takes the routers' messages with `receive`, writes
its answers into `outgoing(connection)`, and `flush`es them once a turn, so that a step of 256 sequences is one message.
"""

import asyncio
import queue
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.network.arrival import ArrivalInterceptor
from common.network.grpc_options import PEERS
from common.network.health import Health
from common.network.peers import Peers
from common.security.cluster_secret import SecretInterceptor
from common.worker import message_size
from common.worker.config import WorkerConfig
from common.worker.registration import Registration
from common.worker.unsent import Unsent
from twostroke.event_loop import EventLoop
from twostroke.v1 import worker_pb2 as pb
from twostroke.v1 import worker_pb2_grpc

log = structlog.get_logger(__name__)

SERVICE = "twostroke.v1.Worker"

WRONG_SECRET = "the worker has a cluster secret, and this call not the same: set --cluster-secret-file on the router"

# Most messages that wait for the engine. No more are read until it takes some, so gRPC holds the routers up.
MAX_UNREAD_MESSAGES = 1_000
UNREAD_PAUSE = 0.005  # seconds

NO_MESSAGE = "what the router sent is no message that a worker takes"

# A router's hello comes right behind its call.
HELLO_SECONDS = 10.0

# A worker that stops waits so long for routers that are behind to read the rest.
LAST_WORDS_SECONDS = 4.0

# Most reasons to remember why routers refused this worker.
MAX_REFUSALS = 256

# An engine that has not called `receive` for this long hangs. By then routers have given it up, too, unless their
# --worker-silence-seconds is longer than the default.
SILENT_SECONDS = 30.0
HEALTH_INTERVAL = 1.0


@dataclass(frozen=True, slots=True)
class Received:
    """A message from a router's connection; None if the connection is gone."""

    connection: int
    message: pb.RouterMessage | None


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Serves `twostroke.v1.Worker` and health at `config.listen`, and registers with `config.router`.

    Args:
        hello: what every router is told first.
        config: the worker's settings.
        peers: the secret and certificates of the cluster.

    Raises:
        AddressError: the address cannot be listened on.
    """

    def __init__(self, hello: pb.WorkerHello, config: WorkerConfig, peers: Peers) -> None:
        self._hello = hello
        self._peers = peers
        self._inbox: queue.SimpleQueue[Received] = queue.SimpleQueue()
        self._outgoing: dict[int, pb.WorkerMessage] = defaultdict(pb.WorkerMessage)
        self._connections: dict[int, Unsent] = {}
        self._next_connection = 0
        self._refusals: dict[str, set[str]] = {}  # by router: its reasons, each of which is logged once
        self._health = Health()
        self._serving = self._hangs = self._stopped = False
        self._healthy: bool | None = None  # what health says now
        self._turn_at = time.monotonic()
        self._loop = EventLoop()
        self._changed = asyncio.Event()
        started: Future[str] = Future()
        self._thread = threading.Thread(target=self._run, args=(config, started), name="grpc", daemon=True)
        self._thread.start()
        self.address = started.result()

    # ------------------------------------------------------------ called by the engine's loop

    def receive(self, timeout: float) -> list[Received]:
        """Everything that routers have sent; waits up to `timeout` seconds if there is nothing."""
        received = []
        self._turn_at = time.monotonic()
        try:
            received.append(self._inbox.get(timeout=timeout) if timeout > 0 else self._inbox.get_nowait())
            while True:
                received.append(self._inbox.get_nowait())
        except queue.Empty:
            return received

    def wake(self) -> None:
        """Ends a wait in `receive`; safe from any thread and from signal handlers."""
        self._inbox.put(Received(-1, pb.RouterMessage()))

    @property
    def connections(self) -> tuple[int, ...]:
        """The routers that are connected now."""
        return tuple(self._connections)

    def outgoing(self, connection: int) -> pb.WorkerMessage:
        """The message that the next `flush` sends to this router."""
        return self._outgoing[connection]

    def flush(self) -> None:
        if self._outgoing:
            outgoing, self._outgoing = self._outgoing, defaultdict(pb.WorkerMessage)
            self._loop.call_soon_threadsafe(self._hand_over, outgoing)

    def set_serving(self, serving: bool) -> None:
        """What health says from now on, unless the engine hangs. Safe from any thread and from signal handlers."""
        self._serving = serving
        with suppress(RuntimeError):  # the loop is closed: a signal comes after `stop`
            self._loop.call_soon_threadsafe(self._changed.set)

    def stop(self) -> None:
        """Sends what is flushed, to routers that read it within seconds, closes every stream and ends the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end)
            self._thread.join(timeout=LAST_WORDS_SECONDS + 1)

    # ------------------------------------------------------------ on the gRPC thread

    def _run(self, config: WorkerConfig, started: "Future[str]") -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve(config, started))
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _serve(self, config: WorkerConfig, started: "Future[str]") -> None:
        interceptors: list[grpc.aio.ServerInterceptor] = [ArrivalInterceptor()]
        if (secret := self._peers.secret) is not None:
            interceptors.append(SecretInterceptor(SERVICE, secret, WRONG_SECRET))
        most_bytes = message_size.most_bytes(self._hello.max_length)
        server = grpc.aio.server(
            options=[*PEERS, ("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", most_bytes)],
            interceptors=interceptors,
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        port = self._peers.listen(server, config.listen)
        await self._update_health()
        await server.start()
        registration = Registration(self._hello, self._peers, config.listen, port, config.advertise)
        self._registering = [asyncio.create_task(registration.keep(router)) for router in config.router]
        started.set_result(registration.address)
        while not self._stopped:
            with suppress(TimeoutError):
                async with asyncio.timeout(HEALTH_INTERVAL):
                    await self._changed.wait()
            self._changed.clear()
            await self._update_health()
        await self._health.enter_graceful_shutdown()
        await server.stop(LAST_WORDS_SECONDS)

    def _end(self) -> None:
        self._stopped = True
        self._changed.set()
        for unsent in self._connections.values():
            unsent.ready.set()

    async def _update_health(self) -> None:
        hangs = time.monotonic() - self._turn_at > SILENT_SECONDS
        if hangs and not self._hangs:
            log.error("the engine hangs", silent_seconds=SILENT_SECONDS)
        elif self._hangs and not hangs:
            log.info("the engine goes on")
        self._hangs = hangs
        healthy = self._serving and not self._hangs
        if healthy != self._healthy:
            self._healthy = healthy
            status = health_pb2.HealthCheckResponse.SERVING if healthy else health_pb2.HealthCheckResponse.NOT_SERVING
            for name in ("", SERVICE):
                await self._health.set(name, status)

    def _hand_over(self, outgoing: dict[int, pb.WorkerMessage]) -> None:
        for connection, message in outgoing.items():
            unsent = self._connections.get(connection)
            if unsent is not None:
                unsent.put(message)

    async def Connect(
        self,
        requests: AsyncIterator[pb.RouterMessage],
        context: "grpc.aio.ServicerContext[pb.RouterMessage, pb.WorkerMessage]",
    ) -> AsyncIterator[pb.WorkerMessage]:
        """One router's stream, from its hello until either side goes."""
        hello = None
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await anext(requests, None)
        except TimeoutError:
            pass
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
        if hello is None or not hello.HasField("hello"):
            sentence = f"the first message of a stream must be hello, within {HELLO_SECONDS:g} seconds"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, sentence)
        yield pb.WorkerMessage(hello=self._hello)
        # Nothing can be sent to a router that does not read: it is told of the end once it reads again.
        unsent = Unsent(cut_off=lambda: reader.cancel())
        reader = asyncio.create_task(self._read(hello.hello.router, requests, unsent))
        try:
            while await unsent.ready.wait() and not reader.done():
                unsent.ready.clear()
                while (message := unsent.take()) is not None:
                    yield message
                if self._stopped:
                    break
        finally:
            reader.cancel()
        if unsent.is_cut_off:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the router left too many messages unread")
        if reader.done() and not reader.cancelled() and isinstance(reader.exception(), DecodeError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)

    async def _read(self, router: str, requests: AsyncIterator[pb.RouterMessage], unsent: Unsent) -> None:
        """Reads a router's messages. The engine sees the connection for as long as this runs."""
        connection = self._next_connection
        self._next_connection += 1
        self._connections[connection] = unsent
        self._inbox.put(Received(connection, pb.RouterMessage()))
        told = router not in self._refusals  # a router that refuses comes again every few seconds
        if told:
            log.info("router connected", router=router)
        try:
            async for message in requests:
                if message.refused:
                    self._tell_refusal(router, message.refused)
                    continue
                if not told:
                    told = True
                    self._refusals.pop(router, None)
                    log.info("router connected", router=router)
                self._inbox.put(Received(connection, message))
                while self._inbox.qsize() >= MAX_UNREAD_MESSAGES:  # noqa: ASYNC110 - the engine is of another thread
                    await asyncio.sleep(UNREAD_PAUSE)
        finally:
            del self._connections[connection]
            self._inbox.put(Received(connection, None))
            unsent.ready.set()
            if told:
                log.info("router gone", router=router)

    def _tell_refusal(self, router: str, reason: str) -> None:
        if sum(map(len, self._refusals.values())) >= MAX_REFUSALS:
            self._refusals.clear()  # each will be logged once more
        reasons = self._refusals.setdefault(router, set())
        if reason not in reasons:
            reasons.add(reason)
            log.error("the router refuses this worker, which gets no requests", router=router, reason=reason)
