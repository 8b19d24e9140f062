"""The message of a shared call that is being made."""

from collections.abc import Callable, Sequence

from router.dispatch.settled import Deltas
from twostroke.v1 import inference_pb2 as pb

# After so many bytes other calls get their turn. gRPC's clients refuse messages of over 4 MiB, and one event has at
# most `answer.MOST_TOKENS`. For the time that they take, an event and a delta count as so many bytes at least: a
# message has at most 64 of the ones, or 256 of the others.
MESSAGE_BYTES = 64 << 10
EVENT_BYTES, DELTA_BYTES = MESSAGE_BYTES // 64, MESSAGE_BYTES // 256

Event = pb.GenerateManyResponse.Event


class Message:
    """Events of requests, and their deltas in columns.

    Attributes:
        size: at `MESSAGE_BYTES` it is to be sent.
        with_events: the requests that have events in it. A delta that were added now would come before these.
    """

    __slots__ = ("_counts", "_events", "_numbers", "_response", "_texts", "_token_ids", "size", "with_events")

    def __init__(self) -> None:
        self._response = pb.GenerateManyResponse()
        self._events = self._response.events
        self.with_events: set[int] = set()
        self.size = 0
        # The deltas, in columns.
        self._numbers: list[int] = []
        self._texts: list[str] = []
        self._counts: list[int] = []
        self._token_ids: list[int] = []

    @property
    def empty(self) -> bool:
        return not (self._events or self._numbers)

    def say(self, number: int, events: Sequence[Event]) -> None:
        """Adds a copy of some events of a request."""
        self._events.extend(events)
        self.with_events.add(number)
        self.size += sum(max(EVENT_BYTES, event.ByteSize()) for event in events)

    def add_chunk(self, number: int, write: Callable[[pb.GenerateChunk], None]) -> None:
        """Adds an event with what `write` makes of an empty chunk; nothing if it raises."""
        # Made where it stays: a message that is put into another one is copied.
        event = self._events.add(id=number)
        try:
            write(event.chunk)
        except BaseException:
            del self._events[-1]
            raise
        self.with_events.add(number)
        self.size += max(EVENT_BYTES, event.ByteSize())

    def add_delta(self, number: int, text: str, token_ids: Sequence[int]) -> None:
        """
        Raises:
            UnicodeEncodeError: protobuf would refuse the text, and with it the whole message.
        """
        size = (len(text) if text.isascii() else len(text.encode())) + 5 * len(token_ids)  # 5: the most that one takes
        self._numbers.append(number)
        self._texts.append(text)
        self._counts.append(len(token_ids))
        self._token_ids.extend(token_ids)
        self.size += size if size > DELTA_BYTES else DELTA_BYTES

    def add_deltas(self, deltas: Deltas) -> None:
        """Adds a delta of a word for each of some requests, of which no events are in the message."""
        self._numbers += deltas.numbers
        self._texts += deltas.texts
        self._counts += deltas.token_counts
        self._token_ids += deltas.token_ids
        self.size += DELTA_BYTES * len(deltas.numbers)

    def finished(self, draining: bool) -> pb.GenerateManyResponse:
        response = self._response
        if self._numbers:
            deltas = response.deltas
            deltas.ids.extend(self._numbers)
            deltas.texts.extend(self._texts)
            deltas.token_counts.extend(self._counts)
            deltas.token_ids.extend(self._token_ids)
        response.draining = draining
        return response
