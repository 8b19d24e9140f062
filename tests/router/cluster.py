"""A router with fake workers around it, over real gRPC on loopback."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc

from common.model.model_config import load_config
from router.config import RouterConfig
from router.grammars.guides import Guides
from router.prompts.tokenizer import Tokenizer
from router.server import Router
from tests.router.fake_worker import DECODE, PREFILL, FakeWorker, Script, counting
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import inference_pb2_grpc

PROMPT = tuple(range(40, 60))

T = TypeVar("T")


@dataclass
class Cluster:
    router: Router
    channel: grpc.aio.Channel
    address: str
    prefills: list[FakeWorker] = field(default_factory=list)
    decodes: list[FakeWorker] = field(default_factory=list)

    @property
    def stub(self) -> Any:
        return inference_pb2_grpc.InferenceStub(self.channel)

    @property
    def workers(self) -> list[FakeWorker]:
        return [*self.prefills, *self.decodes]

    async def generate(self, **fields: Any) -> pb.GenerateResponse:
        response: pb.GenerateResponse = await self.stub.Generate(request(**fields), timeout=30)
        return response

    def introduced(self) -> bool:
        """All workers are there, and the pairs among them are known."""
        workers = self.router.dispatcher.workers
        pairs = sum(decode.host == prefill.host for decode in workers.of(DECODE) for prefill in workers.of(PREFILL))
        answered = sum(len(decode.reads) + len(decode.unreadable) for decode in workers.of(DECODE))
        return len(workers.all()) == len(self.workers) and answered == pairs

    def nothing_held(self) -> bool:
        dispatcher = self.router.dispatcher
        idle = dispatcher.running == 0 and dispatcher.queued == 0
        return (
            idle
            and not any(worker.attempts for worker in dispatcher.workers.all())
            and not any(worker.held for worker in self.workers)
        )


def request(
    prompt: Sequence[int] = PROMPT, max_tokens: int | None = 8, stopping: dict[str, Any] | None = None, **fields: Any
) -> pb.GenerateRequest:
    limits: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
    if "text" not in fields and "chat" not in fields:
        fields["token_ids"] = pb.TokenIds(ids=prompt)
    return pb.GenerateRequest(stopping=pb.Stopping(**limits, **(stopping or {})), **fields)


def expected(tokens: int, prompt: Sequence[int] = PROMPT) -> list[int]:
    """What a fake worker answers, however often the request was resumed."""
    return [counting(len(prompt) + place) for place in range(tokens)]


async def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Only what hangs takes the seconds: a machine that is busy with other things takes a few at times."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def cluster(
    model: Path,
    prefills: Sequence[Script | FakeWorker] = (Script(),),
    decodes: Sequence[Script | FakeWorker] = (Script(),),
    ready: bool = True,
    **settings: Any,
) -> AsyncIterator[Cluster]:
    """Both lists give each worker's script. At its end, nobody may hold anything."""
    sides = [
        [worker if isinstance(worker, FakeWorker) else FakeWorker(role, worker) for worker in workers]
        for role, workers in ((PREFILL, prefills), (DECODE, decodes))
    ]
    addresses = [tuple([await worker.start() for worker in workers]) for workers in sides]
    config = RouterConfig(
        model=str(model),
        listen="127.0.0.1:0",
        prefill=addresses[0],
        decode=addresses[1],
        **{"worker_grace": 0.3, **settings},
    )
    loaded = load_config(model)
    router = Router(config, loaded, Tokenizer(model, loaded), Guides(model, loaded))
    address = f"127.0.0.1:{await router.start()}"
    async with grpc.aio.insecure_channel(address) as channel:
        made = Cluster(router, channel, address, *sides)
        try:
            if ready:
                await eventually(made.introduced)
            yield made
            await eventually(made.nothing_held)
        finally:
            await router.stop(0)
            for worker in made.workers:
                await worker.die()


class Background:
    """A cluster on an event loop of its own, for tests that are no coroutines: those that hypothesis calls."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cluster: Cluster) -> None:
        self._loop = loop
        self.cluster = cluster
        self.channel = grpc.insecure_channel(cluster.address, options=[("grpc.max_send_message_length", -1)])
        self.stub: Any = inference_pb2_grpc.InferenceStub(self.channel)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def assert_well(self) -> None:
        """Nobody holds anything, and the next request is answered."""
        self.run(eventually(self.cluster.nothing_held))
        answer = self.run(self.cluster.generate(max_tokens=3))
        assert list(answer.choices[0].token_ids) == expected(3)


@contextmanager
def background(model: Path, **settings: Any) -> Iterator[Background]:
    """As `cluster`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="cluster")
    thread.start()
    context = cluster(model, **settings)
    try:
        made = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(60)
        running = Background(loop, made)
        try:
            yield running
        finally:
            running.channel.close()
            asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
