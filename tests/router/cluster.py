"""A router with fake workers around it, over real gRPC on loopback."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from common.model_config import load_config
from router.config import RouterConfig
from router.server import Router
from router.tokenizer import Tokenizer
from tests.router.fake_worker import DECODE, PREFILL, FakeWorker, Script, counting
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import inference_pb2_grpc

PROMPT = tuple(range(40, 60))


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
        response: pb.GenerateResponse = await self.stub.Generate(request(**fields), timeout=10)
        return response

    def nothing_held(self) -> bool:
        dispatcher = self.router.dispatcher
        idle = dispatcher.running == 0 and dispatcher.queued == 0
        return (
            idle
            and not any(worker.attempts for worker in dispatcher.workers())
            and not any(worker.held for worker in self.workers)
        )


def request(
    prompt: Sequence[int] = PROMPT, max_tokens: int | None = 8, stopping: dict[str, Any] | None = None, **fields: Any
) -> pb.GenerateRequest:
    limits = {} if max_tokens is None else {"max_tokens": max_tokens}
    if "text" not in fields and "chat" not in fields:
        fields["token_ids"] = pb.TokenIds(ids=prompt)
    return pb.GenerateRequest(stopping=pb.Stopping(**limits, **(stopping or {})), **fields)


def expected(tokens: int, prompt: Sequence[int] = PROMPT) -> list[int]:
    """What a fake worker answers, however often the request was resumed."""
    return [counting(len(prompt) + place) for place in range(tokens)]


async def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> None:
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
    router = Router(config, loaded, Tokenizer(model, loaded.vocab_size))
    address = f"127.0.0.1:{await router.start()}"
    async with grpc.aio.insecure_channel(address) as channel:
        made = Cluster(router, channel, address, *sides)
        try:
            if ready:
                await eventually(lambda: len(router.dispatcher.workers()) == len(made.workers))
            yield made
            await eventually(made.nothing_held)
        finally:
            await router.stop(0)
            for worker in made.workers:
                await worker.die()
