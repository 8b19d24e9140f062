"""Streamed answers that share a call of `GenerateMany`: what both clients have in common."""

from collections.abc import Iterator
from typing import TypeAlias

import grpc

from twostroke.errors import TwostrokeError, error_with, shut_down
from twostroke.results import Piece, piece_of
from twostroke.v1 import inference_pb2 as pb

# A larger request has a call of its own: the router reads one request of a shared call after the other, large ones take
# turns with those of other calls, and one that it cannot take ends the call.
MOST_BYTES = 15 << 10

# After a router has refused such a call, requests have calls of their own for so long.
PAUSE_SECONDS = 10.0

# An older router, or one of which too many such calls are open.
REFUSALS = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED)

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Refused(Exception):
    """The router takes no such call, or no more of them. Nothing has come of the request."""


Item: TypeAlias = Piece | pb.GenerateManyResponse.Event | TwostrokeError | Refused
"""What is told of a request."""


def items_of(response: pb.GenerateManyResponse) -> Iterator[tuple[int, Item]]:
    """In their order, each with its request's number."""
    deltas, begin = response.deltas, 0
    token_ids = tuple(deltas.token_ids)
    for number, text, count in zip(deltas.ids, deltas.texts, deltas.token_counts, strict=True):
        end = begin + count
        yield number, Piece(text, "", (), token_ids[begin:end], (), 0, None, None)
        begin = end
    for event in response.events:
        yield event.id, event


def begin_of(number: int, request: pb.GenerateRequest, timeout: float | None) -> pb.GenerateManyRequest:
    begin = pb.GenerateManyRequest.Begin(request=request, timeout_seconds=timeout, reads_deltas=True)
    return pb.GenerateManyRequest(id=number, begin=begin)


def cancel_of(number: int) -> pb.GenerateManyRequest:
    return pb.GenerateManyRequest(id=number, cancel=pb.GenerateManyRequest.Cancel())


def last_item(number: int, error: TwostrokeError | None, *, refused: bool) -> Item:
    """What a call that is over leaves for one of its requests, to be raised on its own.

    Args:
        number: the request's.
        error: how the call ended; None: in order, so its router had nothing under way, and had never seen this request.
        refused: nothing ever came of it, and requests need calls of their own.
    """
    if refused:
        return Refused()
    if error is None:
        end = pb.GenerateManyResponse.End(code=grpc.StatusCode.UNAVAILABLE.value[0], message=shut_down().message)
        return pb.GenerateManyResponse.Event(id=number, end=end)
    return type(error)(error.message, error.code)


class Progress:
    """Of one request.

    Args:
        timeout: seconds that it has.

    Attributes:
        ended: the router has told how it ended.
    """

    def __init__(self, timeout: float | None) -> None:
        self.ended = False
        self._timeout = timeout
        self._begun = False  # the first that is told of a request is an event

    def piece(self, item: Item, *, closed: bool) -> Piece | None:
        """The piece that this is; None: the answer is complete.

        Args:
            closed: the call takes no more requests.

        Raises:
            TwostrokeError: how the request ended, or the call.
            Refused: it needs a call of its own.
        """
        if isinstance(item, Exception):
            raise item
        if isinstance(item, Piece):
            return item
        if not item.HasField("end"):
            self._begun = True
            return piece_of(item.chunk)
        self.ended = True
        if item.end.code:
            code = _CODES.get(item.end.code, grpc.StatusCode.UNKNOWN)
            if code is grpc.StatusCode.UNAVAILABLE and closed and not self._begun:
                raise Refused  # it crossed the router's word that it is about to stop
            raise error_with(code, item.end.message, self._timeout)
        return None
