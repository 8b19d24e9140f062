import asyncio
import math
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

import twostroke
from tests.protos.fake_router import FakeRouter, serving
from twostroke import AsyncClient, shared_call
from twostroke.async_shared_call import AsyncSharedCall


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with serving(FakeRouter()) as router:
        yield router


@pytest.fixture
async def client(router: FakeRouter) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(router.address) as client:
        yield client


async def test_generate_and_chat(client: AsyncClient, router: FakeRouter) -> None:
    assert (await client.generate("Hello", max_tokens=3)).token_ids == (0, 1, 2)
    assert (await client.chat("Hello", max_tokens=2)).text == "t0 t1 "
    assert [request.WhichOneof("input") for request in router.requests] == ["text", "chat"]


async def test_what_is_wrong_is_refused_before_the_call(client: AsyncClient, router: FakeRouter) -> None:
    octets: Any = b"abc"
    for call in (client.generate, client.chat, client.tokenize, client.detokenize):
        with pytest.raises(TypeError, match="not bytes"):
            await call(octets)
    with pytest.raises(twostroke.InvalidArgument, match=r"^stopping\.max_tokens: -1 is not within "):
        client.stream_chat("Hello", max_tokens=-1)
    with pytest.raises(twostroke.InvalidArgument, match=r"^request: has .* bytes"):
        client.stream("x" * (4 << 20))
    assert router.requests == []
    await client.chat([])
    assert [piece async for piece in client.stream_chat([])]
    assert [request.WhichOneof("input") for request in router.requests] == ["chat", "chat"]


async def test_an_answer_that_is_parsed(client: AsyncClient, router: FakeRouter) -> None:
    answer = await client.chat("Hello", parsed=True)
    assert (answer.reasoning_content, answer.tool_calls[0].name) == ("Hm.", "weather")
    await client.chat([answer.message()])
    assert router.requests[-1].chat.messages[0].tool_calls[0].id == "c1"
    pieces = [piece async for piece in client.stream_chat("Hello", parsed=True)]
    assert [call for piece in pieces for call in piece.tool_calls] == list(answer.tool_calls)


async def test_streams(client: AsyncClient) -> None:
    assert "".join([piece.text async for piece in client.stream("Hello", max_tokens=3)]) == "t0 t1 t2 "
    assert [piece.finish async for piece in client.stream_chat("Hello")][-1] is not None


async def test_a_router_that_knows_no_shared_calls(router: FakeRouter) -> None:
    async with AsyncClient(router.address, share_call=True) as client:
        streams = [client.stream("Hello", max_tokens=3) for _ in range(4)]
        pieces = await asyncio.gather(*(_text(stream) for stream in streams))
        assert [*pieces, await _text(client.stream("Hello", max_tokens=2))] == ["t0 t1 t2 "] * 4 + ["t0 t1 "]


async def test_a_shared_call_that_is_refused_late_leaves_its_request_the_rest_of_the_time(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pieces(*_: object) -> AsyncGenerator[Any, None]:
        await asyncio.sleep(0.6)
        if not router.requests:
            raise shared_call.Refused
        yield

    monkeypatch.setattr(AsyncSharedCall, "pieces", pieces)
    router.step_seconds = 0.1
    async with AsyncClient(router.address, share_call=True) as client:
        with pytest.raises(twostroke.DeadlineExceeded, match=r"its timeout of 0\.8 s"):  # 5 steps take 0.5 s
            await _text(client.stream("Hello", max_tokens=5, timeout=0.8))


async def _text(stream: AsyncIterator[twostroke.Piece]) -> str:
    return "".join([piece.text async for piece in stream])


async def test_many_at_once(client: AsyncClient, router: FakeRouter) -> None:
    router.step_seconds = 0.05  # the shortest answer ends long after the last call has come
    lengths = range(20, 36)
    answers = await asyncio.gather(*(client.generate("Hello", max_tokens=count) for count in lengths))
    assert [len(answer.token_ids) for answer in answers] == list(lengths)
    assert router.most_running == 16


async def test_the_other_calls(client: AsyncClient, router: FakeRouter) -> None:
    assert await client.tokenize("Hi") == (72, 105)
    assert await client.tokenize([{"role": "user", "content": "Hi"}], template_variables={"x": 1}) == (72, 105)
    assert router.tokenize_requests[1].chat.template_variables == '{"x": 1}'
    assert await client.detokenize([72, 105]) == "Hi"
    assert (await client.model()).name == "fake"
    assert (await client.load()).running == 0


async def test_errors(client: AsyncClient) -> None:
    with pytest.raises(twostroke.Overloaded, match="as you asked") as caught:
        await client.generate("fail RESOURCE_EXHAUSTED")
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(twostroke.Unavailable):
        async for _ in client.stream("fail UNAVAILABLE"):
            pass


async def test_timeouts(client: AsyncClient, router: FakeRouter) -> None:
    router.step_seconds = 10
    passed = r"^the call did not end within its timeout of 0\.05 s$"
    with pytest.raises(twostroke.DeadlineExceeded, match=passed):
        await client.generate("Hello", timeout=0.05)
    with pytest.raises(twostroke.DeadlineExceeded, match=passed):
        async for _ in client.stream("Hello", timeout=0.05):
            pass


async def test_leaving_the_loop_cancels(client: AsyncClient, router: FakeRouter) -> None:
    router.step_seconds = 0.01
    async for piece in client.stream("Hello", max_tokens=10_000):
        if piece.text:
            break
    assert await asyncio.to_thread(router.cancelled.wait, 20)


async def test_cancelling_the_task_cancels(client: AsyncClient, router: FakeRouter) -> None:
    router.step_seconds = 0.01
    task = asyncio.create_task(client.generate("Hello", max_tokens=10_000))
    assert await asyncio.to_thread(router.begun.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(router.cancelled.wait, 20)


async def test_a_client_that_is_closed_during_a_call_cancels_no_task(router: FakeRouter) -> None:
    """gRPC's calls raise CancelledError then, of which a task group says nothing."""
    router.step_seconds = 10
    client = AsyncClient(router.address)
    stream, idle = client.stream("Hello"), client.stream("Hello")
    await anext(stream)
    await anext(idle)
    router.begun.clear()
    calls = [asyncio.ensure_future(call) for call in (client.generate("Hello"), anext(stream))]
    assert await asyncio.to_thread(router.begun.wait, 20)
    await client.close()
    for call in (*calls, anext(idle)):
        with pytest.raises(twostroke.TwostrokeError, match=r"^the client was closed before the call ended$") as caught:
            await call
        assert caught.value.code is grpc.StatusCode.CANCELLED


async def test_a_client_that_is_closed_says_so(router: FakeRouter) -> None:
    client = AsyncClient(router.address)
    await client.model()
    stream = client.stream("Hello")
    await client.close()
    for call in (client.model(), anext(stream), client.wait_until_ready()):
        with pytest.raises(twostroke.TwostrokeError, match=r"^the client is closed; further calls need a new one$"):
            await call
    await client.close()


async def test_wait_until_ready() -> None:
    ready = threading.Event()
    with serving(FakeRouter(), ready=ready) as router:
        async with AsyncClient(router.address) as client:
            with pytest.raises(twostroke.DeadlineExceeded, match="it has no workers that can serve yet"):
                await client.wait_until_ready(timeout=1)
            ready.set()
            await client.wait_until_ready(timeout=10)
            await client.wait_until_ready(timeout=math.inf)


async def test_waiting_for_a_router_that_is_not_there() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(twostroke.DeadlineExceeded, match=r"was not ready within 1 s: failed to .* refused$"):
            await client.wait_until_ready(timeout=1)


def test_a_client_may_be_made_before_the_event_loop(router: FakeRouter) -> None:
    client = AsyncClient(router.address, api_key="ignored here")

    async def ask() -> str:
        async with client:
            return (await client.generate("Hello", max_tokens=1)).text

    assert asyncio.run(ask()) == "t0 "
