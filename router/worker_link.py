"""The stream to one worker's address, opened again whenever it breaks."""

import asyncio
import random
from collections import deque
from typing import Protocol

import grpc
import structlog

from common.grpc_options import PEERS
from common.peers import Peers
from router.circuit import Circuit
from router.worker import Worker
from router.worker_faults import WorkerFault
from router.workers import Role
from twostroke.v1 import worker_pb2, worker_pb2_grpc

log = structlog.get_logger(__name__)

HELLO_SECONDS = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
PAUSE_AFTER_REFUSAL = 5.0
MOST_ELSEWHERE = 64

Connect = grpc.aio.StreamStreamCall[worker_pb2.RouterMessage, worker_pb2.WorkerMessage]


class Events(Protocol):
    """Whom the link tells what happens."""

    def refusal(self, worker: Worker, expected: Role) -> str | None:
        """Why this worker cannot be used; None where it can."""

    def worker_lost(self, worker: Worker) -> None: ...

    def received(self, worker: Worker, message: worker_pb2.WorkerMessage) -> None:
        """
        Raises:
            WorkerFault: the worker said what it may not, and is lost.
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
        self.refused: str | None = None  # why the worker that is there cannot be used
        self._router = router
        self._peers = peers
        self._silence_seconds = silence_seconds
        self._events = events
        self._circuit = Circuit()
        self._hurry = asyncio.Event()
        self._stream: Connect | None = None
        self._last = ""  # instance that was here last
        self._said_to_be_here: str | None = None  # another one, and so the stream was cut off
        self._elsewhere: deque[str] = deque(maxlen=MOST_ELSEWHERE)  # instances that name this address, and are not here

    def announced(self, instance: str) -> None:
        """The worker says that it is there, as `instance`: no need to wait longer, and another instance is gone."""
        if self.worker is None:
            self._hurry.set()
        elif instance not in (self.worker.instance, *self._elsewhere) and self._stream is not None:
            log.info("worker restarted", worker=self.address, was=self.worker.instance, now=instance)
            self._said_to_be_here = instance
            self._stream.cancel()
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
                problem = "the stream was cut off here"  # which its reader is told with the same exception
            except Exception as error:  # a fault of the router must not lose it the worker for good
                log.exception("link failed", worker=self.address)
                problem = repr(error)
            if problem != self.refused:
                self.refused = None
            if self.worker is not None:
                worker, self.worker = self.worker, None
                self._tell_lost(worker)
                log.warning("worker lost", worker=self.address, instance=worker.instance, reason=problem)
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
        except Exception:  # a fault of the router must not lose it the worker that comes next
            log.exception("link failed", worker=self.address)

    async def _connect(self) -> str:
        """One stream, from hello to its end; returns why it ended."""
        options = [*PEERS, ("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        async with self._peers.channel(self.address, options) as channel:
            stream: Connect = worker_pb2_grpc.WorkerStub(channel).Connect(metadata=self._peers.metadata)
            self._stream = stream
            try:
                async with asyncio.timeout(HELLO_SECONDS):
                    hello = worker_pb2.RouterHello(router=self._router)
                    await stream.write(worker_pb2.RouterMessage(hello=hello))
                    answer = await stream.read()
                if not isinstance(answer, worker_pb2.WorkerMessage) or not answer.HasField("hello"):
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
        """From the engine's first word, which comes after the hello: that is said by a thread that says it for an
        engine that hangs, too."""
        first = await stream.read()
        if not isinstance(first, worker_pb2.WorkerMessage):
            return "the worker closed the stream"
        known, self.refused = self.refused, self._events.refusal(worker, self.role)
        if (reason := self.refused) is not None:
            if reason != known:  # it is asked again every few seconds
                log.error("worker refused", worker=self.address, instance=worker.instance, reason=reason)
            await stream.write(worker_pb2.RouterMessage(refused=reason))
            silence.reschedule(None)
            await asyncio.sleep(PAUSE_AFTER_REFUSAL)
            return reason
        self.worker = worker
        self._note_who_is_here(worker.instance)
        log.info("worker connected", worker=self.address, instance=worker.instance)
        writer = asyncio.create_task(self._write(stream, worker))
        now = asyncio.get_running_loop().time
        try:
            self._events.received(worker, first)
            while isinstance(message := await stream.read(), worker_pb2.WorkerMessage):
                silence.reschedule(now() + self._silence_seconds)
                self._events.received(worker, message)
        finally:
            writer.cancel()
        return "the worker closed the stream"

    def _note_who_is_here(self, instance: str) -> None:
        """Were two workers to name one address, the one elsewhere would end the requests of the one that is here with
        every registration; so it does that once."""
        other, self._said_to_be_here = self._said_to_be_here, None
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
                await stream.write(await worker.next_message())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the stream is over
        except Exception:
            log.exception("cannot write", worker=self.address)
        finally:
            stream.cancel()  # so that the reader sees the end, too


def _this_task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
