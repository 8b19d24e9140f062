"""Many requests over one call: each ends as a call of its own would, and none disturbs the others."""

import asyncio
import gc
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeAlias

import grpc
import pytest
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from benchmarks.load.config import LoadConfig
from cli import bench
from cli.options import Connection
from router import accounting, errors, many, service, validate
from router.callers import api_keys
from router.dispatch import settled
from router.dispatch.dispatcher import STOPPED
from router.dispatch.request import Request
from router.dispatch.settled import Reader, Settled, Stream
from router.generation import Generation
from router.mailbox import Mailbox
from router.many_message import DELTA_BYTES, Message
from router.validate import MAX_SEED
from tests.router.cluster import PROMPT, Cluster, cluster, eventually, expected, request
from tests.router.fake_worker import DECODE, FakeWorker, Script
from tests.router.test_auth import Keys
from twostroke import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    InvalidArgument,
    Overloaded,
    Piece,
    TwostrokeError,
    Unauthenticated,
    Unavailable,
    shared_call,
)
from twostroke.shared_call import MOST_BYTES
from twostroke.v1 import inference_pb2 as pb

Code = grpc.StatusCode
Begin, Cancel = pb.GenerateManyRequest.Begin, pb.GenerateManyRequest.Cancel


def begin(
    number: int, timeout: float | None = None, *, reads_deltas: bool = False, **fields: Any
) -> pb.GenerateManyRequest:
    begin = Begin(request=request(**fields), timeout_seconds=timeout, reads_deltas=reads_deltas)
    return pb.GenerateManyRequest(id=number, begin=begin)


async def events_of(call: Any) -> AsyncIterator[pb.GenerateManyResponse.Event]:
    """In their order; deltas as the events that they would be otherwise."""
    async for response in call:
        for event in (*in_columns(response.deltas), *response.events):
            yield event


def in_columns(deltas: pb.GenerateManyResponse.Deltas) -> Iterator[pb.GenerateManyResponse.Event]:
    token_ids = iter(deltas.token_ids)
    for number, text, count in zip(deltas.ids, deltas.texts, deltas.token_counts, strict=True):
        delta = pb.Delta(text=text, token_ids=islice(token_ids, count))
        yield pb.GenerateManyResponse.Event(id=number, chunk=pb.GenerateChunk(delta=delta))
    assert not list(token_ids)


async def events_until_end(call: Any, number: int) -> list[pb.GenerateManyResponse.Event]:
    """Those about one request."""
    events = []
    async for event in events_of(call):
        if event.id == number:
            events.append(event)
            if event.HasField("end"):
                break
    return events


def late(seconds: float) -> Callable[["Mailbox[Any]"], Awaitable[list[Any]]]:
    """`Mailbox.take`, so much later."""
    take = Mailbox.take

    async def later(mailbox: Mailbox[Any]) -> list[Any]:
        await asyncio.sleep(seconds)
        return await take(mailbox)

    return later


def tokens_of(events: list[pb.GenerateManyResponse.Event]) -> list[int]:
    return [token for event in events for token in event.chunk.delta.token_ids]


def calls_of(it: Cluster, method: str, code: str = "OK") -> float:
    calls = it.router.metrics.registry.get_sample_value("twostroke_calls_total", {"method": method, "code": code})
    return calls or 0


class Threads:
    """`Client`, each step of whose answers is taken by a thread."""

    def __init__(self, target: str, *, share_call: bool) -> None:
        self._client = Client(target, share_call=share_call)
        self._threads = ThreadPoolExecutor(100)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
        self._threads.shutdown(wait=False)

    async def close(self) -> None:
        await asyncio.to_thread(self._client.close)

    async def stream(self, prompt: tuple[int, ...], **options: Any) -> AsyncIterator[Piece]:
        step = partial(asyncio.get_running_loop().run_in_executor, self._threads)
        pieces = self._client.stream(prompt, **options)
        try:
            while (piece := await step(next, pieces, None)) is not None:
                yield piece
        finally:
            await step(pieces.close)


@pytest.fixture(autouse=True, params=[1, settled.LEAST_BATCH], ids=["settled", "not settled"])
def least_batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are settled whenever they can be, or, since there are few, never."""
    monkeypatch.setattr(settled, "LEAST_BATCH", request.param)
    monkeypatch.setattr(many, "SETTLING_WORDS", 1)


Shared: TypeAlias = Callable[[str], AsyncClient | Threads]


@pytest.fixture(params=[AsyncClient, Threads], ids=["asyncio", "threads"])
def shared(request: pytest.FixtureRequest) -> Shared:
    """Makes a client whose answers share a call."""
    return partial(request.param, share_call=True)


async def streamed(client: AsyncClient | Threads, prompt: tuple[int, ...] = PROMPT, **options: Any) -> list[int]:
    return [token async for piece in client.stream(prompt, **options) for token in piece.token_ids]


# ------------------------------------------------------------ answers


async def test_a_hundred_streams_share_a_call(model: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    add, in_columns = Message.add_delta, 0

    def counted(message: Message, number: int, text: str, token_ids: Sequence[int]) -> None:
        nonlocal in_columns
        in_columns += len(token_ids)
        add(message, number, text, token_ids)

    monkeypatch.setattr(Message, "add_delta", counted)
    prompts = [(*PROMPT, *range(40, 40 + length)) for length in range(100)]
    async with cluster(model, decodes=[Script(), Script()]) as it, shared(it.address) as client:
        answers = await asyncio.gather(*(streamed(client, prompt, max_tokens=30) for prompt in prompts))
        assert answers == [expected(30, prompt) for prompt in prompts]
        assert in_columns > 100 * 30 / 2
        assert calls_of(it, "GenerateMany.Begin") == 100
        assert calls_of(it, "GenerateStream") == 0
        assert len(it.router.service._many) == 1


@pytest.mark.parametrize("reads_deltas", [True, False])
@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({}, True),
        ({"n": 3, "sampling": pb.Sampling(seed=MAX_SEED)}, False),
        ({"response": pb.ResponseOptions(logprobs=2)}, False),
        ({"response": pb.ResponseOptions(token_ids=False)}, True),
        ({"stopping": {"stop": ["e"]}, "max_tokens": 60}, True),
        ({"stopping": {"stop_token_ids": [62]}, "max_tokens": 60}, True),
    ],
)
async def test_an_answer_is_the_one_of_a_call_of_its_own(
    model: Path, fields: dict[str, Any], plain: bool, reads_deltas: bool
) -> None:
    def told(chunks: list[pb.GenerateChunk]) -> list[Any]:
        told = []
        for index in range(max(chunk.index for chunk in chunks) + 1):
            own = [chunk for chunk in chunks if chunk.index == index]
            deltas = [chunk.delta for chunk in own]
            told += [
                [chunk.prompt.seed for chunk in own if chunk.HasField("prompt")],
                "".join(delta.text for delta in deltas),
                [token for delta in deltas for token in delta.token_ids],
                [logprob for delta in deltas for logprob in delta.logprobs],
                [(chunk.finish.reason, chunk.finish.stop) for chunk in own if chunk.HasField("finish")],
            ]
        return told

    asked: dict[str, Any] = {"sampling": pb.Sampling(seed=3), "max_tokens": 12} | fields
    async with cluster(model) as it:
        alone = [chunk async for chunk in it.stub.GenerateStream(request(**asked))]
        call = it.stub.GenerateMany(iter([begin(0), begin(5, reads_deltas=reads_deltas, **asked)]))
        responses = [response async for response in call]
        events = [event for it in responses for event in (*in_columns(it.deltas), *it.events) if event.id == 5]
        assert any(response.deltas.ids for response in responses) == (plain and reads_deltas)
        assert events[0].chunk.HasField("prompt")
        assert events[-1].end == pb.GenerateManyResponse.End()
        assert told([event.chunk for event in events[:-1]]) == told(alone)


async def test_deltas_come_after_the_prompt_however_late_they_are_written(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mailbox, "take", late(0.05))
    async with cluster(model, decodes=[Script(step_seconds=0.005)]) as it:
        asked = [begin(number, reads_deltas=True, max_tokens=40) for number in range(20)]
        responses = [response async for response in it.stub.GenerateMany(iter(asked))]
        assert sum(len(response.deltas.ids) for response in responses) >= 40
        for number in range(20):
            told = [event for it in responses for event in (*in_columns(it.deltas), *it.events) if event.id == number]
            assert told[0].chunk.HasField("prompt")
            assert tokens_of(told) == expected(40)
            assert told[-1].HasField("end")


@pytest.mark.parametrize("settling_words", [1, 5])
async def test_what_ends_an_answer_late_does_not_slip_through(
    model: Path, monkeypatch: pytest.MonkeyPatch, settling_words: int
) -> None:
    """Whether it is looked at is decided when a stream is settled, long before it comes."""
    monkeypatch.setattr(many, "SETTLING_WORDS", settling_words)
    taken_in = []
    settle = Settled.settle

    def noted(streams_of: Settled, reader: Reader, streams: list[Stream]) -> int:
        taken_in.append(settle(streams_of, reader, streams))
        return taken_in[-1]

    monkeypatch.setattr(Settled, "settle", noted)
    async with cluster(model, decodes=[Script(step_seconds=0.005)]) as it:
        tokens = expected(40)
        decode = partial(it.router.service._tokenizer.decode, special_tokens=False)
        stop = decode(tokens[29:32])
        before = decode(tokens)[: decode(tokens).index(stop)]
        asked = [
            begin(0, reads_deltas=True, max_tokens=40, stopping={"stop": [stop]}),
            begin(1, reads_deltas=True, max_tokens=40, stopping={"stop_token_ids": [tokens[30]]}),
            begin(2, reads_deltas=True, max_tokens=40),
        ]
        responses = [response async for response in it.stub.GenerateMany(iter(asked))]
    told: dict[int, list[pb.GenerateChunk]] = defaultdict(list)
    for response in responses:
        for event in (*in_columns(response.deltas), *response.events):
            told[event.id].append(event.chunk)
    texts = {number: "".join(chunk.delta.text for chunk in chunks) for number, chunks in told.items()}
    ids = {number: [token for chunk in chunks for token in chunk.delta.token_ids] for number, chunks in told.items()}
    assert texts == {0: before, 1: decode(tokens[:30]), 2: decode(tokens)}
    assert (ids[1], ids[2]) == (tokens[:31], tokens)
    assert (sum(taken_in) > 0) == (settled.LEAST_BATCH == 1)


async def test_a_lost_worker_is_made_up_for(model: Path, shared: Shared) -> None:
    workers = [FakeWorker(DECODE, Script(step_seconds=0.01)) for _ in range(2)]
    async with cluster(model, decodes=workers) as it, shared(it.address) as client:
        answers = [asyncio.ensure_future(streamed(client, max_tokens=60)) for _ in range(6)]
        await eventually(lambda: all(len(worker.running) > 1 for worker in workers))
        await workers[0].die()
        assert [await answer for answer in answers] == [expected(60)] * 6
        it.decodes.remove(workers[0])


async def test_a_load_may_share_a_call(model: Path) -> None:
    load = LoadConfig(requests=6, warmup=2, prompt_tokens="4", output_tokens="5", share_call=True)
    async with cluster(model) as it:
        measured = bench._Measured()
        await bench._measure(Connection(target=it.address), load, measured)
        assert [sum(count for _, count in record.deltas) for record in measured.records] == [5] * 6
        assert calls_of(it, "GenerateMany.Begin") == 8


# ------------------------------------------------------------ how one of them ends


async def test_a_wrong_request_ends_alone(model: Path, shared: Shared) -> None:
    async with cluster(model) as it, shared(it.address) as client:
        running = asyncio.ensure_future(streamed(client, max_tokens=40))
        with pytest.raises(InvalidArgument, match=r"sampling.top_p: 3"):
            await streamed(client, top_p=3)
        assert await running == expected(40)
        assert calls_of(it, "GenerateMany.Begin", "INVALID_ARGUMENT") == 1


@pytest.mark.parametrize("where", ["take", "write", "text"])
async def test_a_bug_that_one_request_meets_ends_that_one(
    model: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    method = "write" if where == "write" else "take"
    works = getattr(Generation, method)

    def broken(generation: Generation, choice: Request, *what: Any) -> Any:
        if choice.id == "meets it" and len(choice.output) > 3:
            if where == "text":
                return "\ud800", [40], None  # which cannot be sent
            if where == "write":
                what[1].delta.text = "half"
            raise RuntimeError("a bug")
        return works(generation, choice, *what)

    monkeypatch.setattr(Generation, method, broken)
    options: Any = {"logprobs": 0} if where == "write" else {}  # which are in no column
    async with (
        cluster(model, decodes=[Script(step_seconds=0.01)]) as it,
        shared(it.address) as client,
    ):
        other = asyncio.ensure_future(streamed(client, max_tokens=30))
        texts: list[str] = []

        async def listen() -> None:
            async for piece in client.stream(PROMPT, max_tokens=30, request_id="meets it", **options):
                texts.append(piece.text)

        with pytest.raises(TwostrokeError, match="a fault of the router; its log says more"):
            await listen()
        assert "half" not in texts
        assert await other == expected(30)


async def test_an_error_that_speaks_of_closing_is_the_requests(
    model: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gRPC does, of a channel."""

    def check(*_: object) -> None:
        raise errors.InvalidArgument("guide", "a bracket is not closed")

    monkeypatch.setattr(validate, "check", check)
    async with cluster(model) as it, shared(it.address) as client:
        with pytest.raises(InvalidArgument, match="guide: a bracket is not closed"):
            await streamed(client)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 20])
async def test_a_cancel_at_any_moment(model: Path, steps: int) -> None:
    async with cluster(model) as it:
        call = it.stub.GenerateMany()
        for number in range(1, 30, 2):
            await call.write(begin(number, max_tokens=50))
            for _ in range(steps):
                await asyncio.sleep(0)
            await call.write(pb.GenerateManyRequest(id=number, cancel=Cancel()))
        await call.write(begin(100))
        assert tokens_of(await events_until_end(call, 100)) == expected(8)
        await call.done_writing()
        async with asyncio.timeout(10):
            assert await call.code() is Code.OK


async def test_who_leaves_the_loop_cancels_one_request(model: Path, shared: Shared) -> None:
    async with (
        cluster(model, decodes=[Script(step_seconds=0.01)]) as it,
        shared(it.address) as client,
    ):
        others = [asyncio.ensure_future(streamed(client, max_tokens=30)) for _ in range(3)]
        async for piece in client.stream(PROMPT, max_tokens=1000):
            if piece.token_ids:
                break
        await eventually(lambda: calls_of(it, "GenerateMany.Begin", "CANCELLED") == 1)
        assert [await other for other in others] == [expected(30)] * 3
        await eventually(it.nothing_held)
        assert await streamed(client, max_tokens=4) == expected(4)


async def test_a_cancel_before_its_prompt_is_tokenized(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(model) as it:
        tokenizer, asked = it.router.service._tokenizer, asyncio.Event()

        async def never(text: str, *, add_special_tokens: bool) -> list[int]:
            asked.set()
            await asyncio.Event().wait()
            return []

        monkeypatch.setattr(tokenizer, "encode", never)
        call = it.stub.GenerateMany()
        await call.write(begin(1, text="hello"))
        await asked.wait()
        await call.write(pb.GenerateManyRequest(id=1, cancel=Cancel()))
        await call.write(pb.GenerateManyRequest(id=7, cancel=Cancel()))  # there is none
        await call.write(begin(2))
        assert tokens_of(await events_until_end(call, 2)) == expected(8)
        await call.done_writing()
        assert [event.id async for event in events_of(call)] == []
        assert await call.code() is Code.OK


async def test_a_deadline_is_the_requests_own(model: Path, shared: Shared) -> None:
    async with (
        cluster(model, decodes=[Script(step_seconds=0.02)]) as it,
        shared(it.address) as client,
    ):
        other = asyncio.ensure_future(streamed(client, max_tokens=30))
        with pytest.raises(DeadlineExceeded, match=r"the call did not end within its timeout of 0\.2 s"):
            await streamed(client, max_tokens=1000, timeout=0.2)
        for over in (0, -1, math.nan):
            with pytest.raises(DeadlineExceeded):
                await streamed(client, timeout=over)
        assert await other == expected(30)


async def test_the_router_keeps_to_the_deadline_by_itself(model: Path) -> None:
    async with cluster(model, decodes=[Script(step_seconds=0.02)]) as it:
        call = it.stub.GenerateMany()
        await call.write(begin(0, timeout=0.2, max_tokens=1000))
        end = (await events_until_end(call, 0))[-1].end
        assert (end.code, end.message) == (Code.DEADLINE_EXCEEDED.value[0], "the caller's deadline passed")
        await eventually(it.nothing_held)
        for number, seconds in enumerate((0.0, -1.0, math.nan, math.inf), start=1):
            await call.write(begin(number, timeout=seconds))
            end = (await events_until_end(call, number))[-1].end
            assert end.code == Code.INVALID_ARGUMENT.value[0]
            assert end.message.startswith("timeout_seconds: ")
        call.cancel()


async def test_a_client_notices_a_deadline_that_its_router_does_not(model: Path, shared: Shared) -> None:
    async with cluster(model, decodes=[Script(silent=True)]) as it, shared(it.address) as client:
        stuck = it.router.service._generator.begin
        it.router.service._generator.begin = None  # type: ignore[method-assign, assignment]
        with pytest.raises(TwostrokeError, match="a fault of the router; its log says more"):
            await streamed(client)
        it.router.service._generator.begin = stuck  # type: ignore[method-assign]
        with pytest.raises(DeadlineExceeded):
            await streamed(client, timeout=0.2)


async def test_where_no_more_calls_are_taken_each_request_has_one_of_its_own(
    model: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(model) as it, shared(it.address) as client:
        monkeypatch.setattr(service, "MOST_OPEN_OF_A_HOST", 0)
        assert await asyncio.gather(*(streamed(client, max_tokens=6) for _ in range(5))) == [expected(6)] * 5
        assert await streamed(client, max_tokens=6) == expected(6)
        assert (calls_of(it, "GenerateMany", "RESOURCE_EXHAUSTED"), calls_of(it, "GenerateStream")) == (1, 6)
        monkeypatch.undo()
        monkeypatch.setattr(shared_call, "PAUSE_SECONDS", 0.0)
        assert await streamed(client, max_tokens=6) == expected(6)
        assert calls_of(it, "GenerateMany.Begin") == 1


async def test_a_refused_call_is_not_tried_again_though_nobody_waited_for_it(
    model: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(model) as it, shared(it.address) as client:
        monkeypatch.setattr(service, "MOST_OPEN_OF_A_HOST", 0)
        with pytest.raises(DeadlineExceeded):
            await streamed(client, timeout=1e-4)
        await eventually(lambda: calls_of(it, "GenerateMany", "RESOURCE_EXHAUSTED") == 1)
        await asyncio.sleep(0.1)  # the client hears of it
        assert await streamed(client, max_tokens=6) == expected(6)
        assert (calls_of(it, "GenerateMany", "RESOURCE_EXHAUSTED"), calls_of(it, "GenerateStream")) == (1, 1)


async def test_a_large_request_has_a_call_of_its_own(model: Path, shared: Shared) -> None:
    async with cluster(model) as it, shared(it.address) as client:
        with pytest.raises(InvalidArgument):  # it does not fit the model
            await streamed(client, tuple([40] * MOST_BYTES))
        assert calls_of(it, "GenerateStream", "INVALID_ARGUMENT") == 1
        assert calls_of(it, "GenerateMany.Begin", "INVALID_ARGUMENT") == 0


async def test_a_fault_before_it_begins(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    async with cluster(model) as it, AsyncClient(it.address, share_call=True) as client:
        monkeypatch.setattr(it.router.service._tracing, "begin", broken)
        with capture_logs() as told, pytest.raises(TwostrokeError, match="a fault of the router"):
            await streamed(client)
        assert [str(entry["exc_info"]) for entry in told if entry["event"] == "request failed"] == ["a bug"]
        assert calls_of(it, "GenerateMany.Begin", "INTERNAL") == 1
        monkeypatch.undo()
        assert await streamed(client) == expected(len(await streamed(client)))
        assert not any(call._served for call in it.router.service._many)


async def test_a_timeout_is_not_counted_as_a_cancel(
    model: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the client's clock is ahead, and its cancel arrives before the router's deadline."""
    monkeypatch.setattr(accounting, "DEADLINE_TOLERANCE", 1.0)
    async with (
        cluster(model, decodes=[Script(step_seconds=0.02)]) as it,
        shared(it.address) as client,
    ):
        passed = (streamed(client, max_tokens=1000, timeout=0.2 + 0.003 * number) for number in range(20))
        results = await asyncio.gather(*passed, return_exceptions=True)
        assert [type(result) for result in results] == [DeadlineExceeded] * 20
        await eventually(it.nothing_held)
        assert calls_of(it, "GenerateMany.Begin", "CANCELLED") == 0
        assert calls_of(it, "GenerateMany.Begin", "DEADLINE_EXCEEDED") == 20


# ------------------------------------------------------------ how the call ends


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ([begin(3), begin(3)], "id: 3 is not larger than 3, which was before it"),
        ([begin(3), begin(2)], "id: 2 is not larger than 3, which was before it"),
        ([pb.GenerateManyRequest(id=1)], "what: one of begin and cancel must be set"),
    ],
)
async def test_a_call_that_breaks_the_rules_ends(
    model: Path, wrong: list[pb.GenerateManyRequest], sentence: str
) -> None:
    async with cluster(model, decodes=[Script(step_seconds=0.01)]) as it:
        call = it.stub.GenerateMany(iter(wrong))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in call:
                pass
        assert (ended.value.code(), ended.value.details()) == (Code.INVALID_ARGUMENT, sentence)


async def test_what_is_no_message_ends_the_call(model: Path) -> None:
    async with cluster(model, decodes=[Script(step_seconds=0.01)]) as it:
        method: Any = it.channel.stream_stream("/twostroke.v1.Inference/GenerateMany")
        call = method(iter([begin(0, max_tokens=1000).SerializeToString(), b"\xff\xff"]))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in call:
                pass
        assert ended.value.code() is Code.INVALID_ARGUMENT
        await eventually(it.nothing_held)


async def test_a_client_that_is_gone_takes_its_requests_along(model: Path, shared: Shared) -> None:
    async with cluster(model, decodes=[Script(step_seconds=0.01)]) as it:
        client = shared(it.address)
        answers = [asyncio.ensure_future(streamed(client, max_tokens=1000)) for _ in range(5)]
        await eventually(lambda: len(it.decodes[0].running) == 5)
        await client.close()
        for answer in answers:
            with pytest.raises(TwostrokeError, match="the client was closed before the call ended"):
                await answer
        await eventually(it.nothing_held)
        await eventually(lambda: not it.router.service._many)


async def test_a_client_that_is_closed_takes_nothing_more(model: Path, shared: Shared) -> None:
    async with cluster(model) as it, shared(it.address) as client:
        assert await streamed(client, max_tokens=5) == expected(5)
        await client.close()
        with pytest.raises(TwostrokeError, match=r"the client (is closed; further calls need a new one|was closed)"):
            await streamed(client)


async def test_a_client_that_is_forgotten_leaves_no_thread(model: Path) -> None:
    def forgotten(address: str) -> list[int]:
        client = Client(address, share_call=True)
        pieces = list(client.stream(PROMPT, max_tokens=5))
        assert call_threads()
        return [token for piece in pieces for token in piece.token_ids]

    def call_threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "twostroke-shared-call"]

    async with cluster(model) as it:
        assert await asyncio.to_thread(forgotten, it.address) == expected(5)
        gc.collect()
        await eventually(lambda: not call_threads())
        await eventually(lambda: not it.router.service._many)


async def test_a_router_that_stops_waits_for_what_runs_and_not_for_the_call(model: Path, shared: Shared) -> None:
    async with (
        cluster(model, decodes=[Script(step_seconds=0.01)]) as it,
        shared(it.address) as client,
    ):
        answer = asyncio.ensure_future(streamed(client, max_tokens=40))
        await eventually(lambda: len(it.decodes[0].running) == 1)
        async with asyncio.timeout(10):
            await it.router.stop(30)
        assert await answer == expected(40)
        with pytest.raises(Unavailable):
            await streamed(client)


async def test_a_router_that_stops_does_not_wait_for_who_goes_on_asking(model: Path, shared: Shared) -> None:
    async with (
        cluster(model, decodes=[Script(step_seconds=0.005)]) as it,
        shared(it.address) as client,
    ):
        over = False

        async def go_on() -> None:
            while not over:
                with suppress(Unavailable):
                    assert await streamed(client, max_tokens=8) == expected(8)

        asking = [asyncio.ensure_future(go_on()) for _ in range(8)]
        await eventually(lambda: it.router.dispatcher.running > 0)
        async with asyncio.timeout(10):
            await it.router.stop(30)
        over = True
        await asyncio.gather(*asking)


async def test_what_outlasts_the_drain_is_unavailable(model: Path) -> None:
    async with cluster(model, decodes=[Script(stop_after=3)]) as it:
        call = it.stub.GenerateMany()
        await call.write(begin(0, max_tokens=100))
        await eventually(lambda: len(it.decodes[0].running) == 1)
        stopping = asyncio.ensure_future(it.router.stop(0.3))
        await asyncio.sleep(0.1)
        await call.write(begin(1))
        ends = {event.id: event.end async for event in events_of(call) if event.HasField("end")}
        assert {number: end.code for number, end in ends.items()} == dict.fromkeys((0, 1), Code.UNAVAILABLE.value[0])
        assert ends[0].message == STOPPED
        assert ends[1].message == "the router is about to stop; it is safe to try again"
        async with asyncio.timeout(5):
            await stopping


async def test_the_client_calls_again_after_its_call_has_ended(model: Path, shared: Shared) -> None:
    async with cluster(model) as it, shared(it.address) as client:
        assert await streamed(client) == expected(len(await streamed(client)))
        for call in it.router.service._many:
            call.drain()
        await eventually(lambda: not it.router.service._many)
        assert await streamed(client, max_tokens=5) == expected(5)


@asynccontextmanager
async def drained(model: Path, shared: Shared) -> AsyncIterator[tuple[Cluster, AsyncClient | Threads]]:
    """A call that has just been told to end, while an answer is still under way in it, which gets to its end."""
    async with (
        cluster(model, decodes=[Script(step_seconds=0.01)]) as it,
        shared(it.address) as client,
    ):
        running = asyncio.ensure_future(streamed(client, max_tokens=100))
        await eventually(lambda: len(it.decodes[0].running) == 1)
        (call,) = it.router.service._many
        call.drain()
        yield it, client
        assert await running == expected(100)
        await eventually(lambda: call not in it.router.service._many)


async def test_a_call_that_is_about_to_end_takes_nothing_more(model: Path, shared: Shared) -> None:
    async with drained(model, shared) as (it, client):
        await asyncio.sleep(0.1)
        assert await streamed(client, max_tokens=5) == expected(5)
        assert len(it.router.service._many) == 2


async def test_what_crosses_the_news_of_a_drain_has_a_call_of_its_own(model: Path, shared: Shared) -> None:
    for _ in range(10):  # now and then a thread has the news before it asks
        async with drained(model, shared) as (it, client):
            assert await streamed(client, max_tokens=5) == expected(5)
            crossed = calls_of(it, "GenerateMany.Begin", "UNAVAILABLE")
            assert calls_of(it, "GenerateStream") == crossed
        if crossed:
            break
    assert crossed == 1


async def test_what_comes_too_late_for_a_call_that_drained_has_another(model: Path, shared: Shared) -> None:
    """The router has ended the call, with nothing under way, and the client begins a request before it hears that."""
    async with cluster(model) as it, shared(it.address) as client:
        for _ in range(5):
            assert await streamed(client, max_tokens=3) == expected(3)
            for call in it.router.service._many:
                call.drain()
            assert await streamed(client, max_tokens=5) == expected(5)


async def test_a_router_that_stops_ends_calls_that_have_only_begun(model: Path) -> None:
    async with cluster(model) as it:
        calls = [it.stub.GenerateMany() for _ in range(30)]
        await asyncio.sleep(0.002)
        async with asyncio.timeout(10):
            await it.router.stop(30)
        for call in calls:
            call.cancel()


async def test_a_fault_in_reading_ends_the_call(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(many.Many, "_begin")
    async with cluster(model) as it:
        call = it.stub.GenerateMany(iter([begin(0)]))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in call:
                pass
        assert ended.value.code() is Code.INTERNAL


@pytest.mark.parametrize("fault", [TimeoutError, asyncio.CancelledError])
async def test_a_fault_that_looks_like_the_callers_doing(
    model: Path, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    async def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        raise fault

    async with cluster(model) as it, AsyncClient(it.address, share_call=True) as client:
        monkeypatch.setattr(it.router.service._tokenizer, "encode", encode)
        with pytest.raises(TwostrokeError, match="a fault of the router"):
            [piece async for piece in client.stream("hello", timeout=20)]


async def test_nothing_is_left_for_the_garbage_collector(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[object]] = []
    remember = many._Served.__init__

    def init(served: Any, number: int) -> None:
        remember(served, number)
        made.append(weakref.ref(served))

    monkeypatch.setattr(many._Served, "__init__", init)
    async with cluster(model, prefills=[Script(reject=5)]) as it:
        gc.collect()
        gc.disable()
        try:
            call = it.stub.GenerateMany(iter([begin(number) for number in range(10)]))
            ends = [event.end.code async for event in events_of(call) if event.HasField("end")]
            assert sorted(ends) == [0] * 5 + [Code.INVALID_ARGUMENT.value[0]] * 5
            await eventually(lambda: sum(served() is not None for served in made) == 0)
        finally:
            gc.enable()


# ------------------------------------------------------------ limits


async def test_messages_have_so_many_bytes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "MESSAGE_BYTES", 2_000)
    async with cluster(model) as it:
        asked = [begin(number, max_tokens=300, response=pb.ResponseOptions(logprobs=2)) for number in range(20)]
        call = it.stub.GenerateMany(iter(asked))
        await eventually(lambda: it.router.dispatcher.running == 20)
        await eventually(lambda: it.router.dispatcher.running == 0)
        tokens = 0
        async for response in call:
            sizes = [event.ByteSize() for event in response.events]
            assert sum(sizes) < 2_000 + 2 * max(sizes)
            tokens += sum(len(event.chunk.delta.logprobs) for event in response.events)
        assert tokens == 20 * 300


async def test_messages_have_so_many_deltas(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "MESSAGE_BYTES", 4 * DELTA_BYTES)
    monkeypatch.setattr(Mailbox, "take", late(0.01))
    async with cluster(model, decodes=[Script(step_seconds=0.02)]) as it:
        call = it.stub.GenerateMany(iter([begin(number, max_tokens=50, reads_deltas=True) for number in range(20)]))
        responses = [response async for response in call]
        assert max(len(response.deltas.ids) for response in responses) == 4
        told = [event for response in responses for event in (*in_columns(response.deltas), *response.events)]
        for number in range(20):
            assert tokens_of([event for event in told if event.id == number]) == expected(50)


async def test_a_call_has_so_many_requests_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "MOST_UNDER_WAY", 2)
    async with cluster(model, decodes=[Script(step_seconds=0.01)]) as it:
        call = it.stub.GenerateMany()
        for number in range(9):
            await call.write(begin(number, max_tokens=1000))
        await call.write(pb.GenerateManyRequest(id=0, cancel=Cancel()))
        await eventually(lambda: calls_of(it, "GenerateMany.Begin", "RESOURCE_EXHAUSTED") == 7)
        await eventually(lambda: it.router.dispatcher.running == 1)  # the cancel was read
        await eventually(lambda: [len(own._served) for own in it.router.service._many] == [1])
        await call.write(begin(9))
        assert tokens_of(await events_until_end(call, 9)) == expected(8)
        call.cancel()


async def test_what_is_begun_and_cancelled_unread_is_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "MOST_UNDER_WAY", 10)
    pairs, read = 500, 0
    reads_on = asyncio.Event()

    async def messages() -> AsyncIterator[pb.GenerateManyRequest]:
        nonlocal read
        for read in range(pairs):
            yield begin(read, max_tokens=1000)
            await asyncio.sleep(0)
            yield pb.GenerateManyRequest(id=read, cancel=Cancel())
            await asyncio.sleep(0)

    async def write(_response: pb.GenerateManyResponse) -> None:
        await reads_on.wait()

    async with cluster(model) as it:
        own = it.router.service
        mailbox: Mailbox[many.Item] = Mailbox(own._turnstile)
        call = many.Many(own._generator, own._settled, own._metrics, own._tracing, mailbox)
        running = asyncio.ensure_future(call.run(messages(), write))
        await asyncio.sleep(1)
        assert not running.done()
        assert read < 100, "the caller is read no further"
        assert len(mailbox._posted) < 200
        reads_on.set()
        async with asyncio.timeout(20):
            await running
        assert read == pairs - 1
        assert not call._tasks
        assert not call._served
        assert call._room._value == 20


async def test_a_host_has_so_many_calls_open(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MOST_OPEN_OF_A_HOST", 2)
    async with cluster(model) as it:
        calls = [it.stub.GenerateMany() for _ in range(2)]
        for call in calls:
            await call.write(begin(0))
            await events_until_end(call, 0)
        refused = it.stub.GenerateMany()
        assert await refused.code() is Code.RESOURCE_EXHAUSTED
        calls[0].cancel()
        await eventually(lambda: len(it.router.service._many) == 1)
        again = it.stub.GenerateMany()
        await again.write(begin(0))
        assert tokens_of(await events_until_end(again, 0)) == expected(8)
        for call in (calls[1], again):
            call.cancel()


async def test_each_request_counts_against_the_keys_limits(model: Path, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.toml")
    key = keys.add("alice", requests_per_minute=4)
    async with (
        cluster(model, api_keys=keys.path) as it,
        AsyncClient(it.address, api_key=key, share_call=True) as client,
    ):
        for _ in range(3):  # the call itself is one
            assert await streamed(client, max_tokens=3) == expected(3)
        with capture_logs() as told:
            for _ in range(5):
                with pytest.raises(Overloaded, match="'alice' may make 4 requests per minute; try again in"):
                    await streamed(client, max_tokens=3)
        assert [entry["event"] for entry in told] == ["call refused"]
        assert calls_of(it, "GenerateMany.Begin", "RESOURCE_EXHAUSTED") == 5


async def test_a_key_that_is_taken_away_begins_nothing_more(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "LOOK_SECONDS", 0.02)
    keys = Keys(tmp_path / "keys.toml")
    key = keys.add("alice")
    async with (
        cluster(model, api_keys=keys.path) as it,
        AsyncClient(it.address, api_key=key, share_call=True) as client,
    ):
        assert await streamed(client, max_tokens=3) == expected(3)
        keys.path.write_text("")

        async def until_refused() -> None:
            while True:
                await streamed(client, max_tokens=3)

        with pytest.raises(Unauthenticated, match="the API key is not one of this router's"):
            await until_refused()
        assert 'method="GenerateMany.Begin"' in generate_latest(it.router.metrics.registry).decode()
