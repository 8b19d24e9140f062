"""Streamed answers that share a call, for threads."""

import itertools
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator
from queue import Empty, SimpleQueue
from typing import TypeAlias

import grpc

from twostroke import shared_call
from twostroke.errors import TwostrokeError, error_of, error_with
from twostroke.results import Piece
from twostroke.shared_call import REFUSALS, Item, Progress, Refused, begin_of, cancel_of, items_of, last_item
from twostroke.v1 import inference_pb2 as pb

OpenCall: TypeAlias = "Callable[[Iterator[pb.GenerateManyRequest]], grpc._CallIterator[pb.GenerateManyResponse]]"


class SyncSharedCall:
    """Opens the call when it is first needed, and again when it has ended or takes nothing more. What is not read as
    fast as it comes waits here.

    Args:
        open_call: makes a call that sends what it iterates over.
    """

    def __init__(self, open_call: OpenCall) -> None:
        self._open_call = open_call
        self._lock = threading.Lock()
        self._lane: _Lane | None = None

    def pieces(self, request: pb.GenerateRequest, timeout: float | None) -> Generator[Piece, None, None]:
        """As a call of `GenerateStream`. Leaving the loop cancels the request.

        Raises:
            TwostrokeError: how the request ended, or the call.
            Refused: it needs a call of its own.
        """
        passed = error_with(grpc.StatusCode.DEADLINE_EXCEEDED, "", timeout)
        if timeout is not None and not timeout > 0:
            raise passed
        ends_at = math.inf if timeout is None else time.monotonic() + timeout
        inbox: SimpleQueue[Item] = SimpleQueue()
        with self._lock:
            if self._lane is not None and time.monotonic() < self._lane.refused_at + shared_call.PAUSE_SECONDS:
                raise Refused
            if self._lane is None or self._lane.closed:
                self._lane = _Lane(self._open_call, self._lock)
            lane = self._lane
            number = lane.begin(request, timeout, inbox)
        progress = Progress(timeout)
        try:
            while True:
                # The router has the deadline, too, but may be out of reach.
                left = None if timeout is None else max(0.0, ends_at - time.monotonic())
                try:
                    item = inbox.get(timeout=left)
                except Empty:
                    raise passed from None
                if (piece := progress.piece(item, closed=lane.closed)) is None:
                    return
                yield piece
        finally:
            lane.leave(number, cancel=not progress.ended)


class _Lane:
    """One call. `begin` is called with the lock held. `leave` is not, since a stream that nobody holds any more is left
    wherever the garbage collector comes upon it: maybe in the thread that has the lock.

    Attributes:
        closed: it takes no more requests.
        refused_at: when the router did not take it, in seconds of the monotonic clock; until then, long ago.
    """

    def __init__(self, open_call: OpenCall, lock: threading.Lock) -> None:
        self.closed = False
        self.refused_at = -math.inf
        self._lock = lock
        self._numbers = itertools.count()
        self._inboxes: dict[int, SimpleQueue[Item]] = {}
        self._outgoing: SimpleQueue[pb.GenerateManyRequest | None] = SimpleQueue()
        self._call = open_call(iter(self._outgoing.get, None))
        threading.Thread(target=self._receive, name="twostroke-shared-call", daemon=True).start()

    def begin(self, request: pb.GenerateRequest, timeout: float | None, inbox: SimpleQueue[Item]) -> int:
        """Returns the request's number; what comes of it goes to `inbox`."""
        number = next(self._numbers)
        self._inboxes[number] = inbox
        self._outgoing.put(begin_of(number, request, timeout))
        return number

    def leave(self, number: int, *, cancel: bool) -> None:
        """Nothing more is wanted of a request."""
        del self._inboxes[number]
        if cancel:
            self._outgoing.put(cancel_of(number))

    def _receive(self) -> None:
        error: TwostrokeError | None = None
        heard = refused = False
        try:
            for response in self._call:
                heard = True
                self.closed = self.closed or response.draining
                for number, item in items_of(response):
                    if (inbox := self._inboxes.get(number)) is not None:
                        inbox.put(item)
        except grpc.RpcError:
            error = error_of(self._call)
            refused = not heard and self._call.code() in REFUSALS
        finally:
            with self._lock:
                self.closed = True
                # Here, and not where a request hears of it: until one has, others would open calls only to be refused.
                if refused:
                    self.refused_at = time.monotonic()
                for number in list(self._inboxes):  # items() would make objects, and so room for the collector
                    if (inbox := self._inboxes.get(number)) is not None:
                        inbox.put(last_item(number, error, refused=refused))
            self._outgoing.put(None)
