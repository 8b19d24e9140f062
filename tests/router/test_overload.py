"""More than the router can do, or than a client takes: memory stays bounded, every call ends in an answer or the right
code, and afterwards nothing is held and the next request is answered."""

import asyncio
import gc
import json
import resource
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from router.answers.answer import MOST_TOKENS
from router.dispatch.request import MAX_UNREAD_TOKENS, Request
from router.prompts.tokenizer import INLINE_BYTES
from router.validate import MAX_MESSAGE_BYTES
from tests.router import models
from tests.router.cluster import Cluster, cluster, eventually, expected, request
from tests.router.fake_worker import DECODE, PREFILL, FakeWorker, Script
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import inference_pb2_grpc, worker_pb2

# Clients each on a connection of its own, whose windows stay as small as they begin: they would grow to megabytes.
OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]

Code = grpc.StatusCode
REFUSED = pb.Chat(messages=[pb.ChatMessage(role="boss", content="x" * INLINE_BYTES)])  # by the template, on a thread
LONG = 32_000  # tokens of an answer: more than gRPC's windows and the router together hold for who does not read


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = models.write(tmp_path_factory.mktemp("long"), models.byte_level())
    (directory / "config.json").write_text(json.dumps(models.CONFIG | {"max_position_embeddings": 2 * LONG}))
    return directory


def workers(max_batch: int = 2048, **script: Any) -> dict[str, Any]:
    """That hold long sequences, each a step of its own."""
    hello = {"max_length": 2 * LONG, "num_blocks": 1 << 16}
    return {
        "prefills": [FakeWorker(PREFILL, Script(), **hello)],
        "decodes": [FakeWorker(DECODE, Script(**script), max_batch=max_batch, **hello)],
    }


async def assert_well(it: Cluster) -> None:
    await eventually(it.nothing_held)
    assert list((await it.generate()).choices[0].token_ids) == expected(8)


async def read_all(call: Any, into: list[pb.GenerateChunk] | None = None) -> None:
    while chunk := await call.read():
        if into is not None:
            into.append(chunk)


def resident_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return Code.OK


async def test_a_burst_of_calls_is_queued_or_told_that_the_queue_is_full(long_model: Path) -> None:
    """And none is cancelled by gRPC, which would hold a thousand of them and no more."""
    async with cluster(
        long_model, decodes=[FakeWorker(DECODE, Script(stop_after=1), max_batch=1)], max_queue=900
    ) as it:
        channels = [channel async for channel in new_channels(it, 2)]
        stubs: list[Any] = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
        calls = [stubs[number % 2].Generate(request(max_tokens=100)) for number in range(1_500)]
        await eventually(lambda: sum(call.done() for call in calls) >= 1_500 - 901, seconds=60)
        assert it.router.dispatcher.queued == 900
        refused = [call for call in calls if call.done()]
        assert {await call.code() for call in refused} == {Code.RESOURCE_EXHAUSTED}
        for call in calls:
            call.cancel()
        await eventually(it.nothing_held)
        for channel in channels:
            await channel.close()


async def test_a_shared_call_that_nobody_reads_ends_too(long_model: Path) -> None:
    async with cluster(long_model, **workers()) as it:
        channels = [channel async for channel in new_channels(it, 1)]
        stub: Any = inference_pb2_grpc.InferenceStub(channels[0])
        call = stub.GenerateMany()
        verbose = request(max_tokens=LONG, response=pb.ResponseOptions(logprobs=20))
        for number in range(2):
            begin = pb.GenerateManyRequest.Begin(request=verbose)
            await call.write(pb.GenerateManyRequest(id=number, begin=begin))
        await call.read()
        await eventually(it.nothing_held)
        await assert_well(it)
        with pytest.raises(grpc.aio.AioRpcError) as ended_with:
            await read_all(call)
        assert ended_with.value.code() is Code.RESOURCE_EXHAUSTED
        assert ended_with.value.details() == "the stream was not read: more than 4096 tokens of an answer waited for it"
        await channels[0].close()


async def test_prompts_that_wait_take_little_memory(long_model: Path) -> None:
    """A queue may hold a thousand of the longest: as Python's numbers they take gigabytes."""
    calls, length = 20, 8_000
    async with cluster(long_model, **workers(max_batch=1, stop_after=1)) as it:
        long = request(prompt=range(300, 500), max_tokens=10)
        for _ in range(length // 200 - 1):
            long.token_ids.ids.extend(range(300, 500))
        tracemalloc.start()
        try:
            asked = [it.stub.Generate(long) for _ in range(calls)]
            await eventually(lambda: it.router.dispatcher.queued + it.router.dispatcher.running == calls)
            gc.collect()
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held / (calls * length) < 20, "bytes for each token"
        for call in asked:
            call.cancel()
        await eventually(it.nothing_held)


async def test_a_queue_of_long_prompts_is_full_before_its_last_place(long_model: Path) -> None:
    async with cluster(long_model, **workers(max_batch=1, stop_after=1), max_queue=2) as it:
        long = request(prompt=[300] * 12_000, max_tokens=10)
        calls = [it.stub.Generate(long)]
        await eventually(lambda: it.router.dispatcher.running == 1)
        calls.append(it.stub.Generate(long))
        await eventually(lambda: it.router.dispatcher.queued == 1)
        assert it.router.metrics.registry.get_sample_value("twostroke_queued_prompt_tokens") == 12_000
        with pytest.raises(
            grpc.aio.AioRpcError, match=r"prompts of 12000 tokens wait, and of at most 16384 may"
        ) as full:
            await it.stub.Generate(long)
        assert full.value.code() is Code.RESOURCE_EXHAUSTED
        calls.append(it.stub.Generate(request(max_tokens=10)))  # for which there is room
        await eventually(lambda: it.router.dispatcher.queued == 2)
        for call in calls:
            call.cancel()
        await eventually(it.nothing_held)
        two = it.stub.Generate(request(prompt=[300] * 20_000, max_tokens=10, n=2))  # it is alone
        await eventually(lambda: it.router.dispatcher.queued == 1)
        two.cancel()


# ---------------------------------------------------------------- who does not read


async def new_channels(it: Cluster, count: int) -> AsyncIterator[grpc.aio.Channel]:
    for _ in range(count):
        yield grpc.aio.insecure_channel(it.address, options=OPTIONS)


async def test_streams_that_nobody_reads_end_and_give_back_what_they_hold(long_model: Path) -> None:
    async with cluster(long_model, **workers()) as it:
        channels = [channel async for channel in new_channels(it, 2)]
        before = resident_mib()
        stubs: list[Any] = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
        verbose = request(max_tokens=LONG, response=pb.ResponseOptions(logprobs=20))  # soon fills gRPC's windows
        calls = [stub.GenerateStream(verbose) for stub in stubs]
        for call in calls:
            await call.read()
        longest = 0

        def ended() -> bool:
            nonlocal longest
            for attempt in it.router.dispatcher.workers.all()[0].attempts.values():
                longest = max(longest, len(attempt.request.output) - attempt.request.taken)
            return it.nothing_held()

        await eventually(ended, seconds=20)
        assert 0 < longest <= MAX_UNREAD_TOKENS + 256  # a step may come before the stream's end does
        assert resident_mib() - before < 80  # as measured: up to 60, and 100 where nothing ends a stream
        await assert_well(it)
        for call in calls:  # who reads after all gets what was sent, and why it is no more
            with pytest.raises(grpc.aio.AioRpcError) as ended_with:
                await read_all(call)
            assert ended_with.value.code() is Code.RESOURCE_EXHAUSTED
            assert (
                ended_with.value.details()
                == "the stream was not read: more than 4096 tokens of an answer waited for it"
            )
        for channel in channels:
            await channel.close()


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_stream_that_nobody_reads_leaves_no_tokens_behind(long_model: Path, leaves: bool) -> None:
    async with cluster(long_model, **workers(stop_after=3000 if leaves else None)) as it:
        [channel] = [channel async for channel in new_channels(it, 1)]
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        gc.collect()
        gc.disable()
        try:
            call = stub.GenerateStream(request(max_tokens=LONG, response=pb.ResponseOptions(logprobs=20)))
            await call.read()
            if leaves:
                (attempt,) = it.router.dispatcher.workers.all()[0].attempts.values()
                await eventually(lambda: attempt.request.posted and len(attempt.request.output) == 3001)
                del attempt
                call.cancel()
            await eventually(it.nothing_held, seconds=20)
            await eventually(lambda: not any(isinstance(held, Request) for held in gc.get_objects()))
        finally:
            gc.enable()
        await channel.close()


async def test_a_stream_that_nobody_reads_does_not_hold_up_the_routers_stop(long_model: Path) -> None:
    async with cluster(long_model, **workers(stop_after=3000)) as it:
        [channel] = [channel async for channel in new_channels(it, 1)]
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        call = stub.GenerateStream(request(max_tokens=LONG, response=pb.ResponseOptions(logprobs=20)))
        await call.read()
        (attempt,) = it.router.dispatcher.workers.all()[0].attempts.values()
        await eventually(lambda: len(attempt.request.output) == 3001)
        assert attempt.request.taken < 3001, "gRPC's windows hold the whole answer"
        async with asyncio.timeout(5):
            await it.router.stop(0)
        await channel.close()


async def test_a_slow_reader_gets_all_of_an_answer(long_model: Path) -> None:
    """As long as it is not too far behind: what gathers meanwhile comes in fewer, larger messages."""
    async with cluster(long_model, **workers()) as it:
        tokens: list[int] = []
        messages = 0
        async for chunk in it.stub.GenerateStream(request(max_tokens=MAX_UNREAD_TOKENS // 2)):
            tokens += chunk.delta.token_ids
            messages += 1
            await asyncio.sleep(0.002 if messages < 50 else 0)
        assert tokens == expected(MAX_UNREAD_TOKENS // 2)
        await assert_well(it)


# ---------------------------------------------------------------- deadlines, queues, sizes


async def test_who_is_behind_when_an_answer_fails_gets_what_came_before(long_model: Path) -> None:
    count = 10 * MOST_TOKENS
    doomed = workers(end_after={count - 1: [worker_pb2.Ended.CAUSE_FAILED]})
    async with cluster(long_model, **doomed, max_resumes=0) as it:
        [channel] = [channel async for channel in new_channels(it, 1)]
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        call = stub.GenerateStream(request(max_tokens=LONG, response=pb.ResponseOptions(logprobs=20)))
        await call.read()
        await eventually(lambda: it.nothing_held())
        chunks: list[pb.GenerateChunk] = []
        assert await code_of(read_all(call, chunks)) is Code.UNAVAILABLE
        assert [token for chunk in chunks for token in chunk.delta.token_ids] == expected(count)
        assert max(len(chunk.delta.token_ids) for chunk in chunks) == MOST_TOKENS
        await channel.close()


@pytest.mark.parametrize(
    ("method", "asked", "ends"),
    [
        ("Generate", request(max_tokens=2), Code.OK),
        ("Generate", request(n=99), Code.INVALID_ARGUMENT),
        ("GenerateStream", request(n=99), Code.INVALID_ARGUMENT),
        ("Generate", request(guide=pb.Guide(regex="(")), Code.INVALID_ARGUMENT),
        ("Generate", request(chat=REFUSED), Code.INVALID_ARGUMENT),
        ("Generate", request(), Code.UNAVAILABLE),
        ("GenerateStream", request(), Code.UNAVAILABLE),
        ("Generate", request(max_tokens=2_000), Code.DEADLINE_EXCEEDED),
        ("GenerateStream", request(max_tokens=2_000), Code.DEADLINE_EXCEEDED),
    ],
)
async def test_a_call_that_is_over_leaves_no_message_behind(
    model: Path, method: str, asked: pb.GenerateRequest, ends: grpc.StatusCode
) -> None:
    """Not until the garbage collector comes either: it may be long in coming, and a message may take 240 MB."""
    sent, kinds = asked.SerializeToString(), (pb.GenerateRequest, pb.Guide, pb.Chat, Request)
    fails = {3: [worker_pb2.Ended.CAUSE_FAILED]} if ends is Code.UNAVAILABLE else {}
    async with cluster(model, decodes=[Script(step_seconds=0.01, end_after=fails)], max_resumes=0) as it:
        gc.collect()
        before = sum(isinstance(held, kinds) for held in gc.get_objects())
        gc.disable()
        try:
            path, channel = f"/twostroke.v1.Inference/{method}", it.channel
            kind_of_call: Any = channel.unary_unary if method == "Generate" else channel.unary_stream
            call = kind_of_call(path)(sent, timeout=0.5 if ends is Code.DEADLINE_EXCEEDED else 10)
            assert await code_of(call if method == "Generate" else read_all(call)) is ends
            await eventually(it.nothing_held)
            await eventually(lambda: sum(isinstance(held, kinds) for held in gc.get_objects()) == before)
        finally:
            gc.enable()


@pytest.mark.parametrize(
    "refused", [request(n=99, text="x" * 1_000_000), b"\xff" * 1_000_000], ids=["field", "garbage"]
)
@pytest.mark.parametrize("too_many", [False, True])
async def test_a_call_that_is_refused_leaves_none_of_its_bytes_behind(
    model: Path, refused: pb.GenerateRequest | bytes, too_many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if too_many:
        monkeypatch.setattr("router.callers.waiting_bytes.MOST", 0)
    sent = refused if isinstance(refused, bytes) else refused.SerializeToString()
    async with cluster(model) as it:
        call: Any = it.channel.unary_unary("/twostroke.v1.Inference/Generate")
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for _ in range(3):
                code = await code_of(call(sent))
                assert code is (Code.RESOURCE_EXHAUSTED if too_many else Code.INVALID_ARGUMENT)
            await eventually(lambda: tracemalloc.get_traced_memory()[0] < len(sent))
        finally:
            tracemalloc.stop()
            gc.enable()


async def test_deadlines_of_a_millisecond(model: Path) -> None:
    async with cluster(model, prefills=[Script(prefill_seconds=0.005)]) as it:
        calls = [it.stub.Generate(request(max_tokens=50), timeout=0.001) for _ in range(300)]
        codes = set(await asyncio.gather(*(code_of(call) for call in calls)))
        assert codes == {Code.DEADLINE_EXCEEDED}
        await assert_well(it)


async def test_every_queue_full(model: Path) -> None:
    """A pool for two requests, a queue for ten, and a hundred that come at once, from ten clients."""
    small = FakeWorker(DECODE, Script(step_seconds=0.002), num_blocks=8, max_length=64)
    async with cluster(model, decodes=[small], max_queue=10) as it:
        channels = [channel async for channel in new_channels(it, 10)]
        stubs: list[Any] = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
        calls = [stub.Generate(request(max_tokens=20), timeout=20) for _ in range(10) for stub in stubs]
        codes = await asyncio.gather(*(code_of(call) for call in calls))
        assert set(codes) == {Code.OK, Code.RESOURCE_EXHAUSTED}
        assert codes.count(Code.OK) >= 12
        await assert_well(it)
        for channel in channels:
            await channel.close()


async def test_far_more_demand_than_room_is_served_in_order(model: Path) -> None:
    small = FakeWorker(DECODE, Script(step_seconds=0.001), num_blocks=8, max_length=64)
    async with cluster(model, decodes=[small]) as it:
        came: list[int] = []
        submit = it.router.dispatcher.submit

        def noting(requests: list[Request]) -> None:
            came.extend(asked.prompt.token_ids[0] for asked in requests)
            submit(requests)

        it.router.dispatcher.submit = noting  # type: ignore[method-assign]
        prompts = [(40 + place,) * 20 for place in range(60)]
        answers = await asyncio.gather(*(it.generate(prompt=prompt, max_tokens=20) for prompt in prompts))
        assert all(list(answer.choices[0].token_ids) == expected(20) for answer in answers)
        assert [reserve.sequence.token_ids[0] for reserve in small.reserves] == came
        await assert_well(it)


async def test_a_batch_that_another_router_fills_is_waited_for(model: Path) -> None:
    """Not tried again and again, with a prefill in vain each time."""
    busy = FakeWorker(DECODE, Script(stop_after=3), max_batch=4)
    busy.others = 4
    async with cluster(model, decodes=[busy]) as it:
        answers = asyncio.gather(*(it.generate() for _ in range(6)))
        await eventually(lambda: it.router.dispatcher.queued == 6)
        await asyncio.sleep(0.3)
        assert (it.router.dispatcher.queued, busy.reserves, it.prefills[0].prefills) == (6, [], [])
        busy.others = 1
        busy.report()
        await eventually(lambda: len(busy.reserves) > 0)
        assert len(busy.reserves) == 3
        busy.script.stop_after = None
        assert all(list(answer.choices[0].token_ids) == expected(8) for answer in await answers)
        await assert_well(it)


async def test_a_load_counts_what_its_message_says_besides(model: Path) -> None:
    """Counted twice, blocks that come free would be asked for by two, and one of them refused: a prefill in vain."""
    decode = FakeWorker(DECODE, Script(silent=True), num_blocks=8, max_length=64)
    async with cluster(model, decodes=[decode]) as it:
        (worker,) = it.router.dispatcher.workers.of(DECODE)
        answer = asyncio.ensure_future(code_of(it.stub.Generate(request())))
        await eventually(lambda: bool(decode.reserves))
        decode.hung = True  # no other load comes
        (attempt,) = decode.held

        def say(free: int, **words: Any) -> None:
            blocks = pb.Blocks(total=8, free=free, in_use=8 - free)
            decode.send(load=pb.WorkerLoad(ready=True, running=len(decode.held), blocks=blocks), **words)

        say(6, reserved=[worker_pb2.Reserved(attempt_id=attempt)])
        await eventually(lambda: worker.attempts[attempt].reserved)
        assert worker.room == 6
        decode.held.clear()
        say(8, ended=[worker_pb2.Ended(attempt_id=attempt, cause=worker_pb2.Ended.CAUSE_REJECTED)])
        assert await answer is Code.INVALID_ARGUMENT
        assert worker.room == 8


async def test_many_of_the_largest_messages_hold_nobody_up(model: Path) -> None:
    largest = request(text="x" * (MAX_MESSAGE_BYTES - 100))
    async with cluster(model) as it:
        calls = [asyncio.ensure_future(code_of(it.stub.Generate(largest, timeout=20))) for _ in range(20)]
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert {*await asyncio.gather(*calls)} - {Code.RESOURCE_EXHAUSTED} == {Code.INVALID_ARGUMENT}
        await assert_well(it)
