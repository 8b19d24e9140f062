"""Several routers on one decode worker that prefills: their dispatchers and its engine, whole but for gRPC."""

import asyncio
from collections import deque
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.parts import worker_parts
from common.worker import load_report
from common.worker.load_report import LoadReport
from common.worker.worker_service import Received
from router.cluster.circuit import Circuit
from router.cluster.worker import Worker
from router.config import RouterConfig
from router.dispatch import claim
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.request import Prompt, Request, State
from router.mailbox import Mailbox
from router.metrics import Metrics
from router.turnstile import Turnstile
from tests import one_worker
from tests.one_worker import OneWorker, Wire, load_tiny
from tests.router.fake_worker import DECODE, FakeWorker
from twostroke.v1 import worker_pb2

BLOCK, BLOCKS = 4, 12


class Wires(Wire):
    """To several routers."""

    def __init__(self) -> None:
        super().__init__()
        self.connections: tuple[int, ...] = ()
        self._messages: dict[int, worker_pb2.WorkerMessage] = {}
        self.flushed: list[tuple[int, worker_pb2.WorkerMessage]] = []

    def outgoing(self, connection: int) -> worker_pb2.WorkerMessage:
        return self._messages.setdefault(connection, worker_pb2.WorkerMessage())

    def flush(self) -> None:
        self.flushed += self._messages.items()
        self._messages = {}


class Connected:
    """A router, as far as the worker sees it."""

    def __init__(self, connection: int, hello: worker_pb2.WorkerHello) -> None:
        self.connection = connection
        self.dispatcher = Dispatcher(RouterConfig(headroom_tokens=4), Metrics())
        self.worker = Worker("there", hello, Circuit())
        self._serial = 0

    def ask(self, prompt_tokens: int, max_length: int) -> Request:
        self._serial += 1
        tokens = tuple((self.connection * 7 + self._serial * 3 + place) % 90 + 40 for place in range(prompt_tokens))
        prompt, sampling = Prompt(tokens, 0, frozenset(), ""), worker_pb2.SamplingParams(top_p=1, repetition_penalty=1)
        asked = Request("", 0, self._serial, prompt, sampling, Mailbox(Turnstile()), max_length)
        self.dispatcher.submit([asked])
        return asked


class OneForSeveral:
    def __init__(self, directory: Path, routers: int) -> None:
        self.one = OneWorker(worker_parts(load_tiny(directory), BLOCKS, BLOCK))
        self.wires = cast(Wires, cast(Any, self.one._wire))
        fake = FakeWorker(DECODE, num_blocks=BLOCKS, block_size=BLOCK, max_length=BLOCK * BLOCKS, prefill_tokens=64)
        self.routers = [Connected(connection, fake.hello) for connection in range(routers)]
        self.wires.connections = tuple(router.connection for router in self.routers)
        engine = self.one._engine
        self._load = LoadReport(cast(Any, self.wires), engine._metrics, engine._load, engine._claims.kept_from)
        self._tell()

    async def turn(self) -> None:
        # There a dispatcher gives away what requests leave, and goes on where it took long, on a busy machine.
        await asyncio.sleep(0)
        for router in self.routers:
            while router.worker.outbox._has_messages.is_set():
                self.wires.to_worker.append(Received(router.connection, await router.worker.outbox.next_message()))
        self.one._engine.turn(draining=False)
        self._tell()

    def _tell(self) -> None:
        self._load.send_if_due(ready=True)
        self.wires.flush()
        flushed, self.wires.flushed = self.wires.flushed, []
        for connection, message in flushed:
            router = self.routers[connection]
            router.dispatcher.received(router.worker, message)


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OneForSeveral:
    monkeypatch.setattr(one_worker, "Wire", Wires)
    monkeypatch.setattr(load_report, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(claim, "PATIENCE", 0.0)
    return OneForSeveral(tmp_path, routers=2)


async def test_one_routers_large_request_gets_its_turn_beside_the_small_ones_of_another(two: OneForSeveral) -> None:
    """A small one that is over leaves room for the next small one, and never enough for the large one."""
    many, few = two.routers
    small = deque(many.ask(5, 12) for _ in range(8))
    for _ in range(5):
        await two.turn()
    large = few.ask(30, 40)
    behind = few.ask(5, 12)
    for _ in range(120):
        await two.turn()
        for _ in range(sum(asked.state is State.FINISHED for asked in small)):
            small.append(many.ask(5, 12))
        small = deque(asked for asked in small if asked.state is not State.FINISHED)
    assert (large.state, behind.state) == (State.FINISHED, State.FINISHED)
    assert many._serial > 20, "the small ones went on, too"
    many.dispatcher.drop(small)
    while two.one.scheduler.count:
        await two.turn()
    assert two.one.parts.blocks.in_use_count == 0
    assert two.one._engine._claims.kept_from(-1) == 0


async def test_what_a_router_claims_is_others_again_when_it_goes(two: OneForSeveral) -> None:
    here, gone = two.routers
    running = here.ask(5, 40)
    for _ in range(3):
        await two.turn()
    gone.ask(36, 48)
    for _ in range(3):
        await two.turn()
    assert two.one._engine._claims.kept_from(here.connection) == 10  # of 36 tokens and 4 of head-room
    waits = here.ask(5, 12)
    await two.turn()
    assert (running.state, waits.state) == (State.DISPATCHED, State.QUEUED)
    two.wires.connections = (here.connection,)
    two.wires.to_worker.append(Received(gone.connection, None))
    for _ in range(3):
        await two.turn()
    assert waits.state is State.DISPATCHED
