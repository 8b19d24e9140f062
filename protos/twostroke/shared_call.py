"""Streamed answers that share a call of `GenerateMany`."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from contextvars import Context
from typing import TypeAlias

import grpc

from twostroke.errors import TwostrokeError, closed, error_of, error_with, shut_down
from twostroke.v1 import inference_pb2 as pb

Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.GenerateManyRequest, pb.GenerateManyResponse]"
Inbox: TypeAlias = "asyncio.Queue[pb.GenerateManyResponse.Event | TwostrokeError]"

# A larger request has a call of its own: the router reads one request of a shared call after the other, large ones take
# turns with those of other calls, and one that it cannot take ends the call.
MOST_BYTES = 15 << 10


class SharedCall:
    """Opens the call when it is first needed, and again when it has ended or takes nothing more. What is not read as
    fast as it comes waits here.

    Args:
        open_call: makes a call.
    """

    def __init__(self, open_call: Callable[[], Call]) -> None:
        self._open_call = open_call
        self._lane: _Lane | None = None

    async def chunks(
        self, request: pb.GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """As a call of `GenerateStream`. Leaving the loop cancels the request.

        Raises:
            TwostrokeError: how the request ended, or the call.
        """
        passed = error_with(grpc.StatusCode.DEADLINE_EXCEEDED, "", timeout)
        if timeout is not None and not timeout > 0:
            raise passed
        if self._lane is None or self._lane.closed:
            # Not in the context of whoever happens to be the first.
            self._lane = Context().run(lambda: _Lane(self._open_call()))
        lane = self._lane
        inbox: Inbox = asyncio.Queue()
        number = lane.begin(request, timeout, inbox)
        timer = None
        if timeout is not None:  # the router has it, too, but may be out of reach
            timer = asyncio.get_running_loop().call_later(timeout, inbox.put_nowait, passed)
        ended = False
        try:
            while True:
                event = await inbox.get()
                if isinstance(event, TwostrokeError):
                    raise event
                if event.HasField("end"):
                    ended = True
                    if event.end.code:
                        code = _CODES.get(event.end.code, grpc.StatusCode.UNKNOWN)
                        raise error_with(code, event.end.message, timeout)
                    return
                yield event.chunk
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
        begin = pb.GenerateManyRequest.Begin(request=request, timeout_seconds=timeout)
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
        error = shut_down()
        try:
            async for response in self._call:
                self.closed = self.closed or response.draining
                for event in response.events:
                    if (inbox := self._inboxes.get(event.id)) is not None:
                        inbox.put_nowait(event)
        except grpc.aio.AioRpcError as ended:
            if ended.details() != _WRITTEN_TO_LATE:
                error = error_of(ended)
        except (grpc.aio.UsageError, asyncio.CancelledError):  # so gRPC tells of a channel that was closed
            error = closed()
        finally:
            self.closed = self.over = True
            for inbox in self._inboxes.values():
                inbox.put_nowait(type(error)(error.message, error.code))  # each is raised on its own
            self._tasks[0].cancel()


# gRPC's words where a message is written to a call that has just ended, whatever it ended with.
_WRITTEN_TO_LATE = "Internal error from Core"

_CODES = {code.value[0]: code for code in grpc.StatusCode}
