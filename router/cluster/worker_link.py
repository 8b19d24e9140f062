"""The stream to one worker's address, which is opened again whenever it breaks."""

import asyncio
import random
from collections import deque
from contextlib import suppress
from typing import Protocol

import grpc
import structlog

from common.network.grpc_options import PEERS
from common.network.peers import Peers
from router.cluster.circuit import Circuit
from router.cluster.worker import Worker
from router.cluster.worker_faults import WorkerFault
from router.cluster.workers import Role
from twostroke.v1 import worker_pb2, worker_pb2_grpc

log = structlog.get_logger(__name__)

# Seconds.
HELLO_SECONDS = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # between two tries; each pause is twice as long as the one before
PAUSE_AFTER_REFUSAL = 5.0

MOST_ELSEWHERE = 64

OPTIONS = (
    *PEERS,
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    # What gRPC reads ahead of a router that is behind. The rest stays with the worker, which joins messages meanwhile.
    # Not to grow with the bandwidth. A larger message takes a round trip longer, and one more for each further MiB.
    ("grpc.http2.lookahead_bytes", 16 << 10),
    ("grpc.http2.bdp_probe", 0),
)

Connect = grpc.aio.StreamStreamCall[worker_pb2.RouterMessage, worker_pb2.WorkerMessage]


class Events(Protocol):
    """What the link calls when something happens."""

    def refusal(self, worker: Worker, expected: Role) -> str | None:
        """Why this worker can't be used; None if it can."""

    def worker_lost(self, worker: Worker) -> None: ...

    def received(self, worker: Worker, message: worker_pb2.WorkerMessage) -> None:
        """
        Raises:
            WorkerFault: the worker broke the protocol. The link closes the stream.
        """


class WorkerLink:
    def __init__(
        self,
        address: str,
        role: Role,
        router: str,
        peers: Peers,
        silence_seconds: float,
        events: Events,
    ) -> None:
        self.address = address
        self.role = role
        self.worker: Worker | None = None
        self.refused: str | None = None  # why the worker at this address can't be used
        self._refused_instance = ""
        self._router = router
        self._peers = peers
        self._silence_seconds = silence_seconds
        self._events = events
        self._circuit = Circuit()
        self._hurry = asyncio.Event()
        self._stream: Connect | None = None
        self._last = ""  # the last instance that was connected
        self._announced: str | None = None  # the instance for whose registration the stream was closed
        self._elsewhere: deque[str] = deque(maxlen=MOST_ELSEWHERE)  # instances that register this address by mistake

    def announced(self, instance: str) -> None:
        """A worker registers this address as its own. If the link has none, it tries at once. If it has another
        instance, that one must have been restarted, so its stream is closed."""
        if self.worker is None:
            if self.refused is None or instance != self._refused_instance:
                self._hurry.set()
        elif instance not in (self.worker.instance, *self._elsewhere) and self._stream is not None:
            log.info("worker restarted", worker=self.address, was=self.worker.instance, now=instance)
            self._announced = instance
            self._stream.cancel()
            self._hurry.set()

    def ask_again(self) -> None:
        """If the worker was refused, it may fit now, since another one has left."""
        if self.refused is not None:
            self._hurry.set()

    async def run(self) -> None:
        pause, told = FIRST_PAUSE, ""
        while True:
            self._hurry.clear()
            problem, broke_off = "", False
            try:
                problem = await self._connect()
            except grpc.aio.AioRpcError as error:
                problem = error.details() or str(error.code())
            except (TimeoutError, asyncio.InvalidStateError) as error:
                problem = str(error) or type(error).__name__
            except WorkerFault as fault:
                problem, broke_off = f"it broke the protocol: {fault}", True
            except asyncio.CancelledError:
                if _this_task_is_cancelled():
                    raise
                problem = "the stream was cut off here"  # a cancelled stream raises the same exception
            except Exception as error:  # a bug of the router must not end the link for good
                log.exception("link failed", worker=self.address)
                problem = repr(error)
            if problem != self.refused:
                self.refused = None
            if self.worker is not None:
                worker, self.worker = self.worker, None
                # A worker that stops in order says that it is not ready, and finishes what it has.
                in_order = not (broke_off or worker.attempts or worker.load.ready)
                tell, event = (log.info, "worker left") if in_order else (log.warning, "worker lost")
                tell(event, worker=self.address, instance=worker.instance, reason=problem)
                self._tell_lost(worker)
                pause, told = LONGEST_PAUSE if broke_off else FIRST_PAUSE, ""
            elif problem not in (told, self.refused):
                log.info("no worker yet; trying on", worker=self.address, reason=problem)
                told = problem
            try:
                async with asyncio.timeout(pause * random.uniform(0.8, 1.2)):
                    await self._hurry.wait()
            except TimeoutError:
                pause = min(2 * pause, LONGEST_PAUSE)

    def _tell_lost(self, worker: Worker) -> None:
        try:
            self._events.worker_lost(worker)
        except Exception:  # as in `run`
            log.exception("link failed", worker=self.address)

    async def _connect(self) -> str:
        """Opens a stream and follows it to its end. Returns why it ended."""
        async with self._peers.channel(self.address, OPTIONS) as channel:
            stream: Connect = worker_pb2_grpc.WorkerStub(channel).Connect(metadata=self._peers.metadata)
            self._stream = stream
            try:
                async with asyncio.timeout(HELLO_SECONDS):
                    hello = worker_pb2.RouterHello(router=self._router)
                    await stream.write(worker_pb2.RouterMessage(hello=hello))
                    answer = await _read(stream)
                if answer is None or not answer.HasField("hello"):
                    return "it did not say hello"
                try:
                    async with asyncio.timeout(self._silence_seconds) as silence:
                        return await self._follow(stream, Worker(self.address, answer.hello, self._circuit), silence)
                except TimeoutError:
                    return f"nothing came from it for {self._silence_seconds:g} s"
            finally:
                self._stream = None
                stream.cancel()

    async def _follow(self, stream: Connect, worker: Worker, silence: asyncio.Timeout) -> str:
        """Follows a stream from its second message on. The worker counts as connected only from there: a hello comes
        from another thread, also if the engine hangs."""
        first = await _read(stream)
        if first is None:
            return "the worker closed the stream"
        known, self.refused = self.refused, self._events.refusal(worker, self.role)
        if (reason := self.refused) is not None:
            if reason != known:  # it is asked again every few seconds
                log.error("worker refused", worker=self.address, instance=worker.instance, reason=reason)
            self._refused_instance = worker.instance
            await stream.write(worker_pb2.RouterMessage(refused=reason))
            silence.reschedule(None)
            with suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_AFTER_REFUSAL):
                    await self._hurry.wait()
            return reason
        self.worker = worker
        self._note_who_is_here(worker.instance)
        log.info("worker connected", worker=self.address, instance=worker.instance)
        writer = asyncio.create_task(self._write(stream, worker))
        now = asyncio.get_running_loop().time
        try:
            self._events.received(worker, first)
            while (message := await _read(stream)) is not None:
                silence.reschedule(now() + self._silence_seconds)
                self._events.received(worker, message)
        finally:
            writer.cancel()
        return "the worker closed the stream"

    def _note_who_is_here(self, instance: str) -> None:
        """If two workers register one address, the one that can't be reached there must not have the other's stream
        closed with every registration. So each instance can do that once."""
        other, self._announced = self._announced, None
        if instance != self._last:
            self._last = instance
            self._elsewhere.clear()
        elif other is not None:
            self._elsewhere.append(other)
            log.error(
                "another worker registers with this one's address: set --listen or --advertise on it",
                worker=self.address,
                instance=instance,
                other=other,
            )

    async def _write(self, stream: Connect, worker: Worker) -> None:
        try:
            while True:
                await stream.write(await worker.outbox.next_message())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the stream is over
        except Exception:
            log.exception("cannot write", worker=self.address)
        finally:
            stream.cancel()  # ends the reader, too


async def _read(stream: Connect) -> worker_pb2.WorkerMessage | None:
    """The next message; None at the stream's end.

    Raises:
        WorkerFault: what came is no message. grpcio makes None of that, which must not pass for an end in order.
    """
    message: object = await stream.read()
    if message is None:
        raise WorkerFault("what it sent is no message")
    return message if isinstance(message, worker_pb2.WorkerMessage) else None


def _this_task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
