"""Threads' shared call, over a call of this test's own."""

import gc
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import grpc
import pytest

from twostroke import TwostrokeError, Unavailable, sync_shared_call
from twostroke.errors import error_of
from twostroke.results import Piece
from twostroke.shared_call import Item, last_item
from twostroke.sync_shared_call import SyncSharedCall
from twostroke.v1 import inference_pb2 as pb

Stream: TypeAlias = Generator[Piece, None, None]


class Gone(grpc.RpcError):
    pass


class FakeCall:
    """Answers each request with the prompt's information, until it is lost."""

    def __init__(self, requests: Iterator[pb.GenerateManyRequest]) -> None:
        self.lost = threading.Event()
        self._requests = requests

    def __iter__(self) -> Iterator[pb.GenerateManyResponse]:
        for request in self._requests:
            if request.HasField("begin"):
                chunk = pb.GenerateChunk(prompt=pb.PromptInfo(request_id="r"))
                yield pb.GenerateManyResponse(events=[pb.GenerateManyResponse.Event(id=request.id, chunk=chunk)])
            elif self.lost.is_set():
                raise Gone

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "gone"


class Forgotten:
    """Holds a stream, and is part of a cycle: only the garbage collector frees it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.itself = self


def begun(shared: SyncSharedCall, count: int) -> list[Stream]:
    streams = [shared.pieces(pb.GenerateRequest(text="a"), None) for _ in range(count)]
    for stream in streams:
        next(stream)
    return streams


def lose(call: FakeCall, told: Stream) -> None:
    """`told`: a stream whose end has the call look whether it is lost."""
    call.lost.set()
    told.close()


@pytest.fixture
def collector_off() -> Iterator[None]:
    thresholds = gc.get_threshold()
    gc.collect()
    gc.disable()
    yield
    gc.set_threshold(*thresholds)
    gc.enable()


def calls_into(calls: list[FakeCall]) -> SyncSharedCall:
    def open_call(requests: Iterator[pb.GenerateManyRequest]) -> Any:
        calls.append(FakeCall(requests))
        return calls[-1]

    return SyncSharedCall(open_call)


@pytest.mark.usefixtures("collector_off")
def test_the_collector_may_leave_a_stream_while_the_call_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[FakeCall] = []

    def collecting(*arguments: Any, **named: Any) -> Item:
        gc.collect()
        return last_item(*arguments, **named)

    monkeypatch.setattr(sync_shared_call, "last_item", collecting)
    shared = calls_into(calls)
    streams = begun(shared, 3)
    Forgotten(streams.pop())
    with ThreadPoolExecutor() as pool:
        read = pool.submit(next, streams[0])
        lose(calls[0], streams[1])
        with pytest.raises(Unavailable, match="gone"):
            read.result(timeout=10)
    assert next(shared.pieces(pb.GenerateRequest(text="b"), None)).prompt is not None
    assert len(calls) == 2


@pytest.mark.usefixtures("collector_off")
def test_the_collector_may_come_while_all_streams_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[FakeCall] = []

    def collecting(status: Any) -> TwostrokeError:
        error = error_of(status)
        gc.set_threshold(gc.get_count()[0] + len(streams) // 2)  # objects more, in the middle of what is done for all
        gc.enable()
        return error

    monkeypatch.setattr(sync_shared_call, "error_of", collecting)
    shared = calls_into(calls)
    streams = begun(shared, 200)
    Forgotten(streams.pop(20))
    lose(calls[0], streams.pop())
    for stream in streams:
        with pytest.raises(Unavailable, match="gone"):
            next(stream)
