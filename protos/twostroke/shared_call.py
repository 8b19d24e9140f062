"""Streamed answers that share a call of `GenerateMany`."""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from contextvars import Context
from typing import TypeAlias

import grpc

from twostroke.errors import TwostrokeError, closed, error_of, error_with, shut_down
from twostroke.results import Piece, piece_of
from twostroke.v1 import inference_pb2 as pb

Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.GenerateManyRequest, pb.GenerateManyResponse]"
Inbox: TypeAlias = "asyncio.Queue[Piece | pb.GenerateManyResponse.Event | TwostrokeError | Refused]"

# A larger request has a call of its own: the router reads one request of a shared call after the other, large ones take
# turns with those of other calls, and one that it cannot take ends the call.
MOST_BYTES = 15 << 10

# After a router has refused such a call, requests have calls of their own for so long.
PAUSE_SECONDS = 10.0


class Refused(Exception):
    """The router takes no such call, or no more of them. Nothing has come of the request."""


class SharedCall:
    """Opens the call when it is first needed, and again when it has ended or takes nothing more. What is not read as
    fast as it comes waits here.

    Args:
        open_call: makes a call.
    """

    def __init__(self, open_call: Callable[[], Call]) -> None:
        self._open_call = open_call
        self._lane: _Lane | None = None
        self._refused_at = -math.inf

    async def pieces(self, request: pb.GenerateRequest, timeout: float | None) -> AsyncGenerator[Piece, None]:
        """As a call of `GenerateStream`. Leaving the loop cancels the request.

        Raises:
            TwostrokeError: how the request ended, or the call.
            Refused: it needs a call of its own.
        """
        passed = error_with(grpc.StatusCode.DEADLINE_EXCEEDED, "", timeout)
        if timeout is not None and not timeout > 0:
            raise passed
        if time.monotonic() < self._refused_at + PAUSE_SECONDS:
            raise Refused
        if self._lane is None or self._lane.closed:
            # Not in the context of whoever happens to be the first.
            self._lane = Context().run(lambda: _Lane(self._open_call()))
        lane = self._lane
        inbox: Inbox = asyncio.Queue()
        number = lane.begin(request, timeout, inbox)
        timer = None
        if timeout is not None:  # the router has it, too, but may be out of reach
            timer = asyncio.get_running_loop().call_later(timeout, inbox.put_nowait, passed)
        begun = ended = False
        try:
            while True:
                event = await inbox.get()
                if isinstance(event, Piece):
                    begun = True
                    yield event
                    continue
                if isinstance(event, Refused):
                    self._refused_at = time.monotonic()
                if isinstance(event, Exception):
                    raise event
                if event.HasField("end"):
                    ended = True
                    if event.end.code:
                        code = _CODES.get(event.end.code, grpc.StatusCode.UNKNOWN)
                        if code is grpc.StatusCode.UNAVAILABLE and lane.closed and not begun:
                            raise Refused  # it crossed the router's word that it is about to stop
                        raise error_with(code, event.end.message, timeout)
                    return
                begun = True
                yield piece_of(event.chunk)
        finally:
            if timer is not None:
                timer.cancel()
            lane.leave(number, cancel=not ended)


class _Lane:
    """One call.

    Attributes:
        closed: it takes no more requests.
        over: nothing more comes of it.
    """

    def __init__(self, call: Call) -> None:
        self.closed = self.over = False
        self._call = call
        self._numbers = itertools.count()
        self._inboxes: dict[int, Inbox] = {}
        self._outgoing: asyncio.Queue[pb.GenerateManyRequest] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._receive())]

    def begin(self, request: pb.GenerateRequest, timeout: float | None, inbox: Inbox) -> int:
        """Returns the request's number; what comes of it goes to `inbox`."""
        number = next(self._numbers)
        self._inboxes[number] = inbox
        begin = pb.GenerateManyRequest.Begin(request=request, timeout_seconds=timeout, reads_deltas=True)
        self._outgoing.put_nowait(pb.GenerateManyRequest(id=number, begin=begin))
        return number

    def leave(self, number: int, *, cancel: bool) -> None:
        """Nothing more is wanted of a request."""
        del self._inboxes[number]
        if cancel and not self.over:
            self._outgoing.put_nowait(pb.GenerateManyRequest(id=number, cancel=pb.GenerateManyRequest.Cancel()))

    async def _send(self) -> None:
        # The call's end, which is what keeps a message from being written, is for `_receive` to tell.
        with suppress(grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._outgoing.get())

    async def _receive(self) -> None:
        error, heard, refused = shut_down(), False, False
        try:
            async for response in self._call:
                heard = True
                self.closed = self.closed or response.draining
                for number, piece in _pieces_of(response.deltas):
                    if (inbox := self._inboxes.get(number)) is not None:
                        inbox.put_nowait(piece)
                for event in response.events:
                    if (inbox := self._inboxes.get(event.id)) is not None:
                        inbox.put_nowait(event)
        except grpc.aio.AioRpcError as ended:
            too_late = ended.details() == _WRITTEN_TOO_LATE
            refused = not heard and (too_late or ended.code() in _REFUSALS)
            if not too_late:
                error = error_of(ended)
        except (grpc.aio.UsageError, asyncio.CancelledError):  # so gRPC tells of a channel that was closed
            error = closed()
        finally:
            self.closed = self.over = True
            for inbox in self._inboxes.values():
                # Each is raised on its own.
                inbox.put_nowait(Refused() if refused else type(error)(error.message, error.code))
            self._tasks[0].cancel()


def _pieces_of(deltas: pb.GenerateManyResponse.Deltas) -> Iterator[tuple[int, Piece]]:
    """Each with its request's number."""
    token_ids, begin = tuple(deltas.token_ids), 0
    for number, text, count in zip(deltas.ids, deltas.texts, deltas.token_counts, strict=True):
        end = begin + count
        yield number, Piece(text, "", (), token_ids[begin:end], (), 0, None, None)
        begin = end


# gRPC's words where a message is written to a call that has just ended, whatever it ended with.
_WRITTEN_TOO_LATE = "Internal error from Core"

# An older router, or one of which too many such calls are open.
_REFUSALS = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED)

_CODES = {code.value[0]: code for code in grpc.StatusCode}
