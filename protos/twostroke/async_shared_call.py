"""Streamed answers that share a call, for asyncio."""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from contextvars import Context
from typing import TypeAlias

import grpc

from twostroke import shared_call
from twostroke.errors import TwostrokeError, closed, error_of, error_with, shut_down
from twostroke.results import Piece
from twostroke.shared_call import REFUSALS, Item, Progress, Refused, begin_of, cancel_of, items_of, last_item
from twostroke.v1 import inference_pb2 as pb

Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.GenerateManyRequest, pb.GenerateManyResponse]"
Inbox: TypeAlias = "asyncio.Queue[Item]"


class AsyncSharedCall:
    """Opens the call when it is first needed, and again when it has ended or takes nothing more. What is not read as
    fast as it comes waits here.

    Args:
        open_call: makes a call.
    """

    def __init__(self, open_call: Callable[[], Call]) -> None:
        self._open_call = open_call
        self._lane: _Lane | None = None

    async def pieces(self, request: pb.GenerateRequest, timeout: float | None) -> AsyncGenerator[Piece, None]:
        """As a call of `GenerateStream`. Leaving the loop cancels the request.

        Raises:
            TwostrokeError: how the request ended, or the call.
            Refused: it needs a call of its own.
        """
        passed = error_with(grpc.StatusCode.DEADLINE_EXCEEDED, "", timeout)
        if timeout is not None and not timeout > 0:
            raise passed
        if self._lane is not None and time.monotonic() < self._lane.refused_at + shared_call.PAUSE_SECONDS:
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
        progress = Progress(timeout)
        try:
            while (piece := progress.piece(await inbox.get(), closed=lane.closed)) is not None:
                yield piece
        finally:
            if timer is not None:
                timer.cancel()
            lane.leave(number, cancel=not progress.ended)


class _Lane:
    """One call.

    Attributes:
        closed: it takes no more requests.
        over: nothing more comes of it.
        refused_at: when the router did not take it, in seconds of the monotonic clock; until then, long ago.
    """

    def __init__(self, call: Call) -> None:
        self.closed = self.over = False
        self.refused_at = -math.inf
        self._call = call
        self._numbers = itertools.count()
        self._inboxes: dict[int, Inbox] = {}
        self._outgoing: asyncio.Queue[pb.GenerateManyRequest] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._receive())]

    def begin(self, request: pb.GenerateRequest, timeout: float | None, inbox: Inbox) -> int:
        """Returns the request's number; what comes of it goes to `inbox`."""
        number = next(self._numbers)
        self._inboxes[number] = inbox
        self._outgoing.put_nowait(begin_of(number, request, timeout))
        return number

    def leave(self, number: int, *, cancel: bool) -> None:
        """Nothing more is wanted of a request."""
        del self._inboxes[number]
        if cancel and not self.over:
            self._outgoing.put_nowait(cancel_of(number))

    async def _send(self) -> None:
        # The call's end, which is what keeps a message from being written, is for `_receive` to tell.
        with suppress(grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._outgoing.get())

    async def _receive(self) -> None:
        error: TwostrokeError | None = None
        heard = refused = False
        try:
            async for response in self._call:
                heard = True
                self.closed = self.closed or response.draining
                for number, item in items_of(response):
                    if (inbox := self._inboxes.get(number)) is not None:
                        inbox.put_nowait(item)
        except grpc.aio.AioRpcError as ended:
            too_late = ended.details() == _WRITTEN_TOO_LATE
            refused = not heard and (too_late or ended.code() in REFUSALS)
            if not too_late:
                error = error_of(ended)
            elif not self.closed:
                error = shut_down()
        except (grpc.aio.UsageError, asyncio.CancelledError):  # so gRPC tells of a channel that was closed
            error = closed()
        finally:
            self.closed = self.over = True
            # Here, and not where a request hears of it: until one has, others would open calls only to be refused.
            if refused:
                self.refused_at = time.monotonic()
            for number, inbox in self._inboxes.items():
                inbox.put_nowait(last_item(number, error, refused=refused))
            self._tasks[0].cancel()


# gRPC's words where a message is written to a call that has just ended, whatever it ended with.
_WRITTEN_TOO_LATE = "Internal error from Core"
