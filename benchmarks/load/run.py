"""Puts a load on a router, and records what comes back."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Protocol

from benchmarks.load.config import LoadConfig, check
from benchmarks.load.record import Record
from benchmarks.load.workload import Request, arrivals, requests
from twostroke import Piece, TwostrokeError
from twostroke.v1 import inference_pb2 as pb

DEFAULT_CONCURRENCY = 8
DEFAULT_REQUESTS = 100


class LoadedClient(Protocol):
    """What a load asks: `AsyncClient`, or another engine in its place."""

    async def model(self) -> pb.GetModelResponse: ...

    def stream(
        self, prompt: Sequence[int], /, *, max_tokens: int, ignore_eos: bool, temperature: float
    ) -> AsyncGenerator[Piece, None]: ...


async def run(client: LoadedClient, config: LoadConfig, on_record: Callable[[Record], None]) -> list[Record]:
    """Returns the records of all measured requests, in the order in which they ended. `on_record` gets each at once.

    Raises:
        ValueError: the settings make no sense.
        TwostrokeError: the router does not answer. Requests that fail are recorded, and raise nothing.
    """
    check(config)
    model = await client.model()
    # Special tokens are at either end of most vocabularies: drawing from the middle avoids them.
    vocabulary = range(model.vocab_size // 8, model.vocab_size * 7 // 8)
    longest = min(filter(None, (model.limits.max_total_tokens, model.context_length)))
    work = requests(config, vocabulary, longest)

    warmup = _Load(client, config, lambda record: None)
    await warmup.closed_loop(islice(work, config.warmup), DEFAULT_CONCURRENCY)

    most = config.requests or (None if config.duration else DEFAULT_REQUESTS)
    load = _Load(client, config, on_record)
    if config.rate:
        await load.open_loop(islice(work, most), arrivals(config.rate, config.seed))
    else:
        await load.closed_loop(islice(work, most), config.concurrency or DEFAULT_CONCURRENCY)
    return load.records


class _Load:
    def __init__(self, client: LoadedClient, config: LoadConfig, on_record: Callable[[Record], None]) -> None:
        self.records: list[Record] = []
        self._client = client
        self._config = config
        self._on_record = on_record
        self._began = time.perf_counter()

    async def closed_loop(self, work: Iterator[Request], concurrency: int) -> None:
        async def worker() -> None:
            while not self._over(self._now()) and (request := next(work, None)):
                await self._send(request, due=self._now())

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())

    async def open_loop(self, work: Iterator[Request], due_times: Iterator[float]) -> None:
        async with asyncio.TaskGroup() as group:
            for request, due in zip(work, due_times, strict=False):
                if self._over(due):
                    break
                await asyncio.sleep(due - self._now())
                group.create_task(self._send(request, due))

    async def _send(self, request: Request, due: float) -> None:
        deltas: list[tuple[float, int]] = []
        record = Record(due=due, ended=due, prompt_tokens=len(request.prompt), deltas=())
        try:
            async for piece in self._client.stream(
                request.prompt,
                max_tokens=request.output_tokens,
                ignore_eos=True,
                temperature=self._config.temperature,
            ):
                if piece.token_ids:
                    deltas.append((self._now(), len(piece.token_ids)))
                if piece.finish:
                    usage = piece.finish.usage
                    record = replace(
                        record,
                        prefill_cached_tokens=usage.prefill_cached_tokens,
                        decode_cached_tokens=usage.decode_cached_tokens,
                        resumes=usage.resumes,
                    )
        except TwostrokeError as error:
            record = replace(record, error=error.code.name)
        record = replace(record, ended=self._now(), deltas=tuple(deltas))
        self.records.append(record)
        self._on_record(record)

    def _now(self) -> float:
        return time.perf_counter() - self._began

    def _over(self, now: float) -> bool:
        return self._config.duration is not None and now >= self._config.duration
