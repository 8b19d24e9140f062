"""Streams for which a further token is a look-up and no more: what is known of them lies in columns.

A decode step has a token for each of hundreds of streams. Taken one by one, through the objects of its request, a token
costs little while these are in the processor's caches; but from one step to the next, other processes have them. So the
streams that share a call, and of which there is nothing special to know, have a row each in the columns here, and a
step is a few operations on whole columns. Whatever is not a look-up, such as a last token or a part of a character,
takes a stream out again, and is done by the request's objects as for any other.
"""

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.telemetry.plain_histogram import PlainHistogram
from router.dispatch.request import Request
from router.vocabulary.words import Words

if TYPE_CHECKING:
    from router.dispatch.decoding import Decoding

Rows = NDArray[np.intp]

NOBODY = 0  # the row of a stream that is not settled. It has no room, so nothing is added to it
FIRST_ROWS = 256
LEAST_BATCH = 32  # streams of a reader and a worker: with fewer, operations on columns cost more than they save
MOST_TOKENS = 1024  # that a stream gets before it has to leave; its request's output gets them then


class Stream(NamedTuple):
    """
    Attributes:
        number: by which its reader knows it.
    """

    request: Request
    number: int
    wants_token_ids: bool


class Deltas(NamedTuple):
    """What came next of some streams, an entry for each."""

    numbers: list[int]
    texts: list[str]
    token_counts: list[int]
    token_ids: list[int]


@dataclass(slots=True, eq=False)
class Reader:
    """A call, which its streams share.

    Attributes:
        wake: called when there are tokens to take, and there were none.
        told: rows that got a token; some may have left since.
        settled: its streams that are settled, by worker.
    """

    id: int
    wake: Callable[[], None]
    told: list[Rows] = field(default_factory=list)
    settled: "Counter[Decoding]" = field(default_factory=Counter)


class Settled:
    """The settled streams of a router. One has at most one token that its reader has not taken.

    Args:
        words: what a token's text is.
        gaps: observes the seconds between tokens.
    """

    def __init__(self, words: Words, gaps: PlainHistogram) -> None:
        self._words = words
        self._gaps = gaps
        self._readers: dict[int, Reader] = {}
        self._reader_ids = itertools.count()
        self._free: list[int] = []
        # By row: lists of what is looked at when a stream comes and goes, and columns of what every token needs.
        self._requests: list[Request | None] = [None]
        self._attempts: list[tuple[Decoding, int] | None] = [None]  # where the stream is decoded, and as which attempt
        self._room_at_first: list[int] = [0]
        self._room = np.zeros(1, np.int64)  # tokens that may follow before the stream has to leave
        self._tokens = np.zeros((1, MOST_TOKENS + 1), np.uint32)  # that came since it was settled, from `_room + 1` on
        self._unread = np.zeros(1, np.bool_)  # whether its reader has yet to take the last
        self._told_at = np.zeros(1, np.float64)  # when its reader took the one before
        self._number = np.zeros(1, np.uint64)
        self._wants_token_ids = np.zeros(1, np.int64)  # 1, or 0
        self._reader = np.zeros(1, np.int64)

    @contextmanager
    def reading(self, wake: Callable[[], None]) -> Iterator[Reader]:
        """A reader, whose streams are settled until the end of the block at most."""
        reader = Reader(next(self._reader_ids), wake)
        self._readers[reader.id] = reader
        try:
            yield reader
        finally:
            for row, request in enumerate(self._requests):
                if request is not None and self._reader[row] == reader.id:
                    self.leave(row)
            del self._readers[reader.id]

    # ------------------------------------------------------------ coming and going

    def is_word(self, token: int) -> bool:
        return self._words.texts[token] != ""

    def may_settle(self, request: Request) -> bool:
        """Whether no word ends the request's answer: all other tokens are looked at."""
        return request.stop_token_ids <= self._words.others

    def settle(self, reader: Reader, streams: Iterable[Stream]) -> int:
        """Takes in those of the streams that a worker decodes, where it decodes enough of the reader's. All tokens of
        them that are there must have been taken. They must be such that may settle, and a word that comes next must
        bring its text and nothing else.

        Returns:
            How many were taken in.
        """
        ready = defaultdict(list)
        for stream in streams:
            request, attempt = stream.request, stream.request.attempt
            if request.posted or request.complete or attempt is None or attempt.decode is None:
                continue
            decoding = attempt.decode.decoding
            if attempt.id in decoding.requests:
                ready[decoding].append((stream, attempt.id))
        taken_in = 0
        for decoding, batch in ready.items():
            if len(batch) + reader.settled[decoding] >= LEAST_BATCH:
                for stream, attempt_id in batch:
                    self._settle(reader, stream, decoding, attempt_id)
                taken_in += len(batch)
        return taken_in

    def _settle(self, reader: Reader, stream: Stream, decoding: "Decoding", attempt_id: int) -> None:
        request = stream.request
        row = self._free.pop() if self._free else self._new_row()
        # Of different length, so that streams that came together do not all leave together.
        most = MOST_TOKENS - row % (MOST_TOKENS // 2)
        self._room[row] = self._room_at_first[row] = min(most, request.most_tokens - len(request.output) - 1)
        self._told_at[row] = request.told_at
        self._number[row] = stream.number
        self._wants_token_ids[row] = stream.wants_token_ids
        self._reader[row] = reader.id
        self._requests[row] = request
        self._attempts[row] = decoding, attempt_id
        reader.settled[decoding] += 1
        decoding.settled = self
        decoding.rows[attempt_id] = row

    def leave(self, row: int) -> None:
        """The stream goes on as a request like any other. If its reader has not taken its last token, it is posted."""
        request, attempt = self._requests[row], self._attempts[row]
        assert request is not None
        assert attempt is not None
        decoding, attempt_id = attempt
        del decoding.rows[attempt_id]
        settled = self._readers[int(self._reader[row])].settled
        settled[decoding] -= 1
        if not settled[decoding]:
            del settled[decoding]
        unread = bool(self._unread[row])
        request.output += self._tokens[row, self._room[row] + 1 : self._room_at_first[row] + 1][::-1].tolist()
        request.taken = len(request.output) - unread
        request.told_at = float(self._told_at[row])
        self._requests[row] = self._attempts[row] = None
        self._unread[row] = False
        self._free.append(row)
        if unread:
            request.post()

    def _new_row(self) -> int:
        row = len(self._requests)
        if row >= len(self._room):
            size = max(2 * row, FIRST_ROWS)
            self._room, self._tokens = _longer(self._room, size), _longer(self._tokens, size)
            self._unread, self._told_at = _longer(self._unread, size), _longer(self._told_at, size)
            self._number, self._reader = _longer(self._number, size), _longer(self._reader, size)
            self._wants_token_ids = _longer(self._wants_token_ids, size)
        self._requests.append(None)
        self._attempts.append(None)
        self._room_at_first.append(0)
        return row

    # ------------------------------------------------------------ tokens

    def add(self, rows_of: dict[int, int], attempt_ids: Sequence[int], token_ids: Sequence[int]) -> Sequence[int]:
        """Adds to each stream its token, if that is a word and not the stream's last, if its reader has taken the one
        before, and if there is no other token of this stream.

        Args:
            rows_of: by attempt id, of those that are settled.

        Returns:
            The places of the tokens that were not added.
        """
        count = len(attempt_ids)
        rows = np.fromiter(map(rows_of.get, attempt_ids, repeat(NOBODY)), np.intp, count)
        tokens = np.fromiter(token_ids, np.uint32, count)
        room = self._room[rows]
        fits = self._words.words[tokens] & (room > 0) & ~self._unread[rows]
        if len(set(attempt_ids)) < count:  # there are streams with several tokens
            fits &= np.bincount(rows)[rows] == 1
        added = np.count_nonzero(fits)
        if not added:
            return range(count)
        rest: Sequence[int] = ()
        if added < count:
            rest = np.flatnonzero(~fits).tolist()
            rows, tokens, room = rows[fits], tokens[fits], room[fits]
        self._tokens[rows, room] = tokens
        self._room[rows] = room - 1
        self._unread[rows] = True
        self._tell(rows)
        return rest

    def _tell(self, rows: Rows) -> None:
        readers = self._reader[rows]
        if (readers == readers[0]).all():
            self._tell_reader(int(readers[0]), rows)
            return
        for reader in np.unique(readers).tolist():
            self._tell_reader(reader, rows[readers == reader])

    def _tell_reader(self, reader_id: int, rows: Rows) -> None:
        reader = self._readers[reader_id]
        if not reader.told:
            reader.wake()
        reader.told.append(rows)

    def to_take(self, reader: Reader, most: int) -> list[Rows]:
        """The rows that have tokens for the reader, in parts of at most so many, to be taken one after the other."""
        if not reader.told:
            return []
        # A row that was left and settled again may be twice in there.
        rows = reader.told[0] if len(reader.told) == 1 else np.unique(np.concatenate(reader.told))
        reader.told = []
        return [rows[begin : begin + most] for begin in range(0, len(rows), most)]

    def take(self, reader: Reader, rows: Rows) -> Deltas | None:
        """The tokens of those rows that still have one for the reader; None if none has."""
        current = self._unread[rows] & (self._reader[rows] == reader.id)
        if not current.all():
            rows = rows[current]
            if not rows.size:
                return None
        tokens = self._tokens[rows, self._room[rows] + 1]
        now = time.monotonic()
        self._gaps.observe_all(now - self._told_at[rows])
        self._told_at[rows] = now
        self._unread[rows] = False
        token_ids, counts = tokens.tolist(), self._wants_token_ids[rows].tolist()
        texts = list(map(self._words.texts.__getitem__, token_ids))
        if not all(counts):
            token_ids = list(compress(token_ids, counts))
        return Deltas(self._number[rows].tolist(), texts, counts, token_ids)


def _longer(column: NDArray[Any], size: int) -> NDArray[Any]:
    longer = np.zeros((size, *column.shape[1:]), column.dtype)
    longer[: len(column)] = column
    return longer
