import asyncio
import time

import pytest
from google.protobuf.message import DecodeError, Message

from router import parsing
from router.callers.limits import CALLER, Caller
from router.errors import CallError
from router.parsing import AT_ONCE, LARGE_BYTES, SHARE, LargeMessages
from twostroke.v1 import inference_pb2 as pb

LONG = b"long"
TAKES = 0.02  # seconds


@pytest.fixture(autouse=True)
def nothing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "AT_ONCE", 0.0)


class Parser:
    """Notes what it parses, and takes its time for what is LONG."""

    def __init__(self) -> None:
        self.parsed: list[bytes] = []

    def __call__(self, received: bytes) -> Message:
        self.parsed.append(received)
        until = time.thread_time() + TAKES * received.startswith(LONG)
        while time.thread_time() < until:
            pass
        if received.endswith(b"broken"):
            raise DecodeError
        return pb.GetLoadRequest()


async def test_the_event_loop_has_most_of_the_time_while_messages_that_take_long_are_parsed() -> None:
    large, parser = LargeMessages(), Parser()
    began = time.monotonic()
    ends = await asyncio.gather(
        *(large.parse(LONG + end, parser) for end in (b"", b"broken", b"")), return_exceptions=True
    )
    assert [isinstance(end, DecodeError) for end in ends] == [False, True, False]
    assert time.monotonic() - began >= 2 * TAKES / SHARE


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.callers.waiting_bytes.MOST_OF_A_CALLER", 3 * len(LONG))
    large, parser = LargeMessages(), Parser()
    await large.parse(LONG, parser)  # after which there is a pause
    ends = await asyncio.gather(*(large.parse(LONG, parser) for _ in range(5)), return_exceptions=True)
    assert [isinstance(end, CallError) for end in ends] == [False, False, False, True, True]
    assert await large.parse(LONG, parser)


async def test_others_have_their_turn_between_one_callers_messages() -> None:
    large, parser = LargeMessages(), Parser()

    async def send(caller: str, *messages: bytes) -> None:
        CALLER.set(Caller(caller))
        await asyncio.gather(*(large.parse(message, parser) for message in messages))

    await asyncio.gather(asyncio.create_task(send("alice", *[LONG] * 6)), asyncio.create_task(send("bob", b"b")))
    assert parser.parsed.index(b"b") <= 3


async def test_a_caller_that_leaves_gives_its_turn_to_the_next() -> None:
    large, parser = LargeMessages(), Parser()
    calls = [asyncio.create_task(large.parse(message, parser)) for message in (LONG, b"left", b"next")]
    await asyncio.sleep(0)
    calls[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls[1]
    await calls[2]
    assert parser.parsed == [LONG, b"next"]


async def test_text_of_any_length_has_no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    text = pb.GenerateRequest(text="x" * LARGE_BYTES).SerializeToString()
    large = LargeMessages()
    for _ in range(3):
        await large.parse(text, pb.GenerateRequest.FromString)
    assert large._paid_at < time.monotonic() + AT_ONCE / SHARE
