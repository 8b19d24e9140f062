"""The router alone: real gRPC, fake workers, 256 streams, each part in a process of its own on the same two cores. The
streams are calls of their own, or share one.

Fake workers tell the time (in tenths of a millisecond, modulo 4 s) by token ids, so that every token tells its age.
"Router" ages are taken in the router, once gRPC has accepted the token's message; "client" ages are taken where the
client receives it, and include Python on both sides. A router has a token "in hand" from when gRPC gave it the worker's
message to when it gave gRPC the client's. For how long a message waits to be read, and what gRPC takes to parse and to
send it, is in the "router" ages alone. In the "bare" runs there is no router and no worker, but a gRPC server that
writes ready-made chunks to the same clients at the same pace: that is gRPC's share.

    python -m benchmarks.router --json router.json
"""

import asyncio
import gc
import json
import multiprocessing
import statistics
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias, TypeVar

import cyclopts
import grpc
from rich.console import Console
from rich.table import Table

from benchmarks.router_delays import RouterDelays, TokenClock
from common import garbage
from common.model.model_config import ModelConfig, load_config
from common.model.model_files import EMBEDDED, resolve
from common.worker.unsent import Unsent
from router.config import RouterConfig
from router.dispatch.decoding import Decoding
from router.dispatch.fan_out import fan_out
from router.dispatch.request import Prompt, Request
from router.grammars.guides import Guides
from router.mailbox import Mailbox
from router.prompts.tokenizer import Tokenizer
from router.server import Router
from router.turnstile import Turnstile
from router.vocabulary.detokenizer import Detokenizer
from tests.router.fake_worker import DECODE, PREFILL, FakeWorker, Script
from twostroke import AsyncClient, Client, Piece, event_loop
from twostroke.v1 import inference_pb2, inference_pb2_grpc, worker_pb2

PROMPT = tuple(range(500, 532))
THREADS = 64  # of the client without an event loop

Number = TypeVar("Number", int, float)

app = cyclopts.App(help=__doc__)
spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Figures:
    name: str
    offered: float  # tokens/s that the fake workers make
    delivered: float  # tokens/s that reached the clients
    messages: float  # messages/s that carried them
    in_hand_p50_ms: float | None  # None: there is no router
    in_hand_p99_ms: float | None
    router_p50_ms: float
    router_p99_ms: float
    client_p50_ms: float
    client_p99_ms: float
    router_cpu_us: float  # of the router's process, a message
    client_cpu_us: float


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What the client received."""

    times: "array[float]"  # of each message
    tokens: "array[int]"  # in each message
    ages: "array[float]"  # of each token, ms
    clock: TokenClock

    @classmethod
    def none_yet(cls, clock: TokenClock) -> Self:
        return cls(array("d"), array("I"), array("d"), clock)

    def add(self, piece: Piece) -> None:
        if piece.token_ids:
            now, age_ms = time.monotonic(), self.clock.age_ms
            self.times.append(now)
            self.tokens.append(len(piece.token_ids))
            self.ages.extend(age_ms(token, now) for token in piece.token_ids)


# ---------------------------------------------------------------- the processes


class SteadyWorker(FakeWorker):
    """Makes the message of a step with next to no work, since it shares the cores with the router that is measured, and
    joins what the router is slow to read, as a worker does."""

    async def _write(self, context: Any, out: asyncio.Queue[worker_pb2.WorkerMessage]) -> None:
        unsent = Unsent(cut_off=lambda: None)
        while True:
            unsent.put(await out.get())
            while not out.empty():
                unsent.put(out.get_nowait())
            while (message := unsent.take()) is not None:
                await context.write(message)

    def _step(self) -> worker_pb2.WorkerMessage:
        token = self.script.token(0)
        tokens = worker_pb2.StepTokens(attempt_ids=self.running, token_ids=[token] * len(self.running))
        ended = []
        for attempt_id, running in self.running.items():
            running.length += 1
            if running.length >= running.max_length:
                ended.append(worker_pb2.Ended(attempt_id=attempt_id, cause=worker_pb2.Ended.CAUSE_FINISHED))
        for end in ended:
            del self.held[end.attempt_id], self.running[end.attempt_id]
        return worker_pb2.WorkerMessage(tokens=tokens, ended=ended)


def workers(pipe: Connection, directory: Path, clock: TokenClock, count: int, step_seconds: float) -> None:
    event_loop.run(_workers(pipe, load_config(directory), clock, count, step_seconds))


async def _workers(pipe: Connection, model: ModelConfig, clock: TokenClock, count: int, step_seconds: float) -> None:
    same = {
        "vocab_size": model.vocab_size,
        "eos_token_ids": model.eos_token_ids,
        "num_blocks": 1 << 20,  # room for all streams
        "max_length": model.context_length,
    }
    prefill = FakeWorker(PREFILL, Script(token=clock.now), max_batch=1 << 20, **same)
    decodes = [SteadyWorker(DECODE, Script(step_seconds=step_seconds, token=clock.now), **same) for _ in range(count)]
    addresses = [await prefill.start()]
    for decode in decodes:
        addresses.append(await decode.start())
        await asyncio.sleep(step_seconds / count)  # so that they do not step together
    pipe.send(addresses)
    await asyncio.to_thread(pipe.recv)
    for worker in (prefill, *decodes):
        await worker.die()


def router(pipe: Connection, directory: Path, clock: TokenClock) -> None:
    event_loop.run(_router(pipe, directory, clock, pipe.recv()))


async def _router(pipe: Connection, directory: Path, clock: TokenClock, addresses: Sequence[str]) -> None:
    model = load_config(directory)
    config = RouterConfig(listen="127.0.0.1:0", prefill=tuple(addresses[:1]), decode=tuple(addresses[1:]))
    service = Router(config, model, Tokenizer(directory, model), Guides(directory, model))
    delays = RouterDelays(service, clock)
    port = await service.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.GetLoadRequest()
        for _ in range(1_000):
            if sum(worker.ready for worker in (await stub.GetLoad(request)).workers) == len(addresses):
                break
            await asyncio.sleep(0.01)
    garbage.forget_start()
    pipe.send(f"127.0.0.1:{port}")
    began = time.process_time()
    await asyncio.to_thread(pipe.recv)
    cpu = time.process_time() - began
    pipe.send((*delays.ages(), cpu))
    await service.stop(0)


def bare(pipe: Connection, clock: TokenClock, groups: int, step_seconds: float) -> None:
    event_loop.run(_bare(pipe, clock, groups, step_seconds))


async def _bare(pipe: Connection, clock: TokenClock, groups: int, step_seconds: float) -> None:
    service = _Bare(clock, groups)
    answer = grpc.unary_stream_rpc_method_handler(
        service.answer,
        request_deserializer=inference_pb2.GenerateRequest.FromString,
        response_serializer=inference_pb2.GenerateChunk.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler("twostroke.v1.Inference", {"GenerateStream": answer})
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    steps = [asyncio.create_task(service.step(group, step_seconds)) for group in range(groups)]
    garbage.forget_start()
    pipe.send(f"127.0.0.1:{port}")
    began = time.process_time()
    await asyncio.to_thread(pipe.recv)
    for step in steps:
        step.cancel()
    pipe.send((array("d"), service.ages, time.process_time() - began))
    await server.stop(0)


class _Bare:
    """Streams in groups; those of a group write at the same time, like those of one decode worker."""

    def __init__(self, clock: TokenClock, groups: int) -> None:
        self.ages = array("d")
        self._clock = clock
        self._waiting: list[list[asyncio.Future[int]]] = [[] for _ in range(groups)]
        self._calls = 0

    async def step(self, group: int, seconds: float) -> None:
        await asyncio.sleep(seconds * group / len(self._waiting))
        next_step = time.monotonic()
        while True:
            next_step = max(next_step + seconds, time.monotonic())
            await asyncio.sleep(next_step - time.monotonic())
            token, waiting = self._clock.now(), self._waiting[group]
            self._waiting[group] = []
            for waiter in waiting:
                waiter.set_result(token)

    async def answer(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        group = self._calls % len(self._waiting)
        self._calls += 1
        for _ in range(request.stopping.max_tokens):
            waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._waiting[group].append(waiter)
            token = await waiter
            delta = inference_pb2.Delta(text=" word", token_ids=[token])
            await context.write(inference_pb2.GenerateChunk(delta=delta))
            self.ages.append(self._clock.age_ms(token, time.monotonic()))


def clients(pipe: Connection, clock: TokenClock, streams: int, tokens: int, shared: bool) -> None:
    event_loop.run(_clients(pipe, clock, pipe.recv(), streams, tokens, shared))


async def _clients(pipe: Connection, clock: TokenClock, address: str, streams: int, tokens: int, shared: bool) -> None:
    arrivals = Arrivals.none_yet(clock)
    gc.disable()  # the client's pauses are not the router's

    async def one(client: AsyncClient) -> None:
        async for piece in client.stream(PROMPT, max_tokens=tokens, ignore_eos=True):
            arrivals.add(piece)

    async with AsyncClient(address, share_call=shared) as client:
        await asyncio.gather(*(one(client) for _ in range(streams)))
    pipe.send((arrivals, time.process_time()))


def threads(pipe: Connection, clock: TokenClock, streams: int, tokens: int, shared: bool) -> None:
    """A thread for each stream."""
    arrivals, address = Arrivals.none_yet(clock), pipe.recv()
    gc.disable()
    one_at_a_time = threading.Lock()

    def one(client: Client) -> None:
        for piece in client.stream(PROMPT, max_tokens=tokens, ignore_eos=True):
            with one_at_a_time:
                arrivals.add(piece)

    with Client(address, share_call=shared) as client, ThreadPoolExecutor(streams) as pool:
        for done in [pool.submit(one, client) for _ in range(streams)]:
            done.result()
    pipe.send((arrivals, time.process_time()))


# ---------------------------------------------------------------- one run

Reader: TypeAlias = Callable[[Connection, TokenClock, int, int, bool], None]


def run(
    name: str,
    directory: Path,
    clock: TokenClock,
    streams: int,
    decode_workers: int,
    tokens_per_second: float,
    seconds: float,
    shared: bool = False,
    reader: Reader = clients,
) -> Figures:
    """Offers `tokens_per_second` to `streams` streams, spread evenly over the decode workers. `shared`: all streams are
    one call."""
    step_seconds = streams / tokens_per_second
    pipe, its = spawn.Pipe()
    behind = spawn.Process(target=workers, args=(its, directory, clock, decode_workers, step_seconds))
    behind.start()
    router_pipe, router_end = spawn.Pipe()
    router_pipe.send(pipe.recv())
    server = spawn.Process(target=router, args=(router_end, directory, clock))
    figures = _measure(name, clock, streams, tokens_per_second, seconds, shared, reader, server, router_pipe)
    pipe.send("stop")
    behind.join()
    return figures


def run_bare(
    name: str, clock: TokenClock, streams: int, groups: int, tokens_per_second: float, seconds: float
) -> Figures:
    """Sends the same tokens from a gRPC server that has them ready."""
    pipe, its = spawn.Pipe()
    server = spawn.Process(target=bare, args=(its, clock, groups, streams / tokens_per_second))
    return _measure(name, clock, streams, tokens_per_second, seconds, False, clients, server, pipe)


def _measure(
    name: str,
    clock: TokenClock,
    streams: int,
    tokens_per_second: float,
    seconds: float,
    shared: bool,
    reader: Reader,
    server: Any,
    server_pipe: Connection,
) -> Figures:
    client_pipe, client_end = spawn.Pipe()
    tokens = int(seconds * tokens_per_second / streams)
    client = spawn.Process(target=reader, args=(client_end, clock, streams, tokens, shared))
    server.start()
    client.start()
    client_pipe.send(server_pipe.recv())
    arrivals, client_cpu = client_pipe.recv()
    server_pipe.send("stop")
    in_hand, server_ages, server_cpu = server_pipe.recv()
    server.join()
    client.join()
    times, in_messages = _steady(arrivals.times), _steady(arrivals.tokens)
    elapsed = times[-1] - times[0]
    known: tuple[float | None, float | None] = _p50_p99(_steady(in_hand)) if in_hand else (None, None)
    return Figures(
        name,
        tokens_per_second,
        sum(in_messages) / elapsed,
        len(in_messages) / elapsed,
        *known,
        *_p50_p99(_steady(server_ages)),
        *_p50_p99(_steady(arrivals.ages)),
        1e6 * server_cpu / len(arrivals.times),
        1e6 * client_cpu / len(arrivals.times),
    )


def _steady(values: "array[Number]") -> "array[Number]":
    """Without the first and last tenth, when streams come and go."""
    return values[len(values) // 10 : -len(values) // 10]


def _p50_p99(values: Sequence[float]) -> tuple[float, float]:
    hundredths = statistics.quantiles(values, n=100)
    return hundredths[49], hundredths[98]


def _in_hand(figures: Figures) -> str:
    if figures.in_hand_p50_ms is None or figures.in_hand_p99_ms is None:
        return "–"
    return f"{figures.in_hand_p50_ms:.1f}, {figures.in_hand_p99_ms:.1f}"


# ---------------------------------------------------------------- the inner loops


def fan_out_rate(streams: int = 256, steps: int = 400) -> float:
    """Tokens/s from a packed message's bytes to the requests' buffers."""
    prompt = Prompt(PROMPT, 0, frozenset(), "")
    mailbox: Mailbox[Request] = Mailbox(Turnstile())
    decoding = Decoding()
    decoding.requests = {
        attempt: Request("", 0, attempt, prompt, worker_pb2.SamplingParams(), mailbox, 1 << 30)
        for attempt in range(streams)
    }
    tokens = worker_pb2.StepTokens(attempt_ids=list(decoding.requests), token_ids=[40_000] * streams)
    packed = worker_pb2.WorkerMessage(tokens=tokens).SerializeToString()
    began = time.process_time()
    for _ in range(steps):
        fan_out(decoding, worker_pb2.WorkerMessage.FromString(packed).tokens)
    return streams * steps / (time.process_time() - began)


def detokenize_microseconds(directory: Path, tokens: int = 100_000) -> float:
    """Microseconds a token, one token at a time."""
    tokenizer = Tokenizer(directory, load_config(directory))
    detokenizer: Detokenizer = tokenizer.detokenizer(special_tokens=False)
    began = time.process_time()
    for token in range(tokens):
        detokenizer.feed((1_000 + token % 40_000,))
    return 1e6 * (time.process_time() - began) / tokens


@app.default
def main(
    *,
    model: str = EMBEDDED,
    streams: int = 256,
    seconds: float = 8.0,
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> None:
    """Prints the router's figures.

    Args:
        model: the model whose tokenizer is used.
        streams: client streams at once.
        seconds: length of a run.
        json_file: also writes the figures there.
    """
    directory = resolve(model)
    clock = TokenClock.of(directory)
    offers = [
        ("60,000 tokens/s", 1, 60_000),
        ("12,500 tokens/s, one decode worker in step", 1, 12_500),
        ("12,500 tokens/s, 16 decode workers", 16, 12_500),
    ]
    runs = []
    for name, decode_workers, offered in offers:
        runs.append(run(name, directory, clock, streams, decode_workers, offered, seconds))
        if offered < 60_000:
            runs.append(run_bare("  the same, bare gRPC", clock, streams, decode_workers, offered, seconds))
        runs.append(
            run("  the same, one call", directory, clock, streams, decode_workers, offered, seconds, shared=True)
        )
    runs.append(run("120,000 tokens/s, one call", directory, clock, streams, 1, 120_000, seconds, shared=True))
    name, in_threads = f"3,000 tokens/s, {THREADS} threads", partial(run, reader=threads)
    runs.append(in_threads(name, directory, clock, THREADS, 1, 3_000, seconds))
    runs.append(in_threads("  the same, one call", directory, clock, THREADS, 1, 3_000, seconds, shared=True))
    rate, microseconds = fan_out_rate(streams), detokenize_microseconds(directory)
    table = Table(
        "run",
        "offered/s",
        "delivered/s",
        "messages/s",
        "in hand p50, p99 ms",
        "router p50, p99 ms",
        "client p50, p99 ms",
        "CPU µs a token",
    )
    for figures in runs:
        table.add_row(
            figures.name,
            f"{figures.offered:,.0f}",
            f"{figures.delivered:,.0f}",
            f"{figures.messages:,.0f}",
            _in_hand(figures),
            f"{figures.router_p50_ms:.1f}, {figures.router_p99_ms:.1f}",
            f"{figures.client_p50_ms:.1f}, {figures.client_p99_ms:.1f}",
            f"{figures.router_cpu_us:.0f} + {figures.client_cpu_us:.0f}",
        )
    console = Console(width=150)
    console.print(table)
    console.print(
        f"worker message to request buffers: {rate:,.0f} tokens/s; detokenizing: {microseconds:.2f} µs a token"
    )
    if json_file is not None:
        result = {"runs": [asdict(figures) for figures in runs], "fan_out_per_s": rate, "detokenize_us": microseconds}
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app()
