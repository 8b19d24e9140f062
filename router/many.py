"""Many requests over one call: what there is to send of all of them goes into the same messages."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeAlias

import grpc
import structlog

from common.telemetry.tracing import Tracing
from router import request_trace
from router.accounting import accounted
from router.callers.limits import CALL_AGAIN, CALLER
from router.dispatch.request import Request
from router.dispatch.settled import Reader, Settled, Stream
from router.errors import CallError, Exhausted, InvalidArgument, fault
from router.generation import Generation, Generator
from router.mailbox import Mailbox
from router.many_message import DELTA_BYTES, MESSAGE_BYTES, Event, Message
from router.metrics import Metrics
from twostroke.v1 import inference_pb2 as pb

log = structlog.get_logger(__name__)

MANY, BEGIN = "GenerateMany", "GenerateMany.Begin"  # the call, and each of its requests

# Requests of a call that may be under way; further ones are refused. Of these, so many may wait to be told: then the
# caller does not read, and is not read.
MOST_UNDER_WAY = 4096

# A text is not worth settling if many of its tokens are parts of characters, or if several come at a time.
SETTLING_WORDS = 8

STOPS = CallError(grpc.StatusCode.UNAVAILABLE, "the router is about to stop; it is safe to try again")
FULL = Exhausted(f"the call has {MOST_UNDER_WAY} requests under way")

End = pb.GenerateManyResponse.End


class _Served:
    """One of the requests.

    Attributes:
        events: what there is to say of it besides the chunks of its answers, and before further ones.
        done: set when its answers are over, or have failed.
        in_columns: its deltas go into the message's columns.
        may_settle: it can be settled, if it has tokens to be looked up.
        words: so many words came one by one, and nothing else after them.
    """

    # Weak references let a test see that none is left.
    __slots__ = (
        "__weakref__",
        "done",
        "ended",
        "events",
        "generation",
        "in_columns",
        "left",
        "may_settle",
        "number",
        "words",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.in_columns = False
        self.may_settle = False
        self.words = 0
        self.generation: Generation | None = None
        self.events: tuple[Event, ...] = ()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = False
        self.left = False  # the task that writes has passed its end


Write: TypeAlias = Callable[[pb.GenerateManyResponse], Awaitable[None]]
Item: TypeAlias = Request | _Served | None  # what has news; None: the call itself, or a settled stream


class Many:
    """One call. Its requests are tasks, which wait for most of the time; all chunks are made by the task that writes.

    Args:
        generator: begins requests.
        settled: where requests of which a token is a look-up are settled.
        mailbox: of the task that writes.
    """

    def __init__(
        self, generator: Generator, settled: Settled, metrics: Metrics, tracing: Tracing, mailbox: Mailbox[Item]
    ) -> None:
        self._generator = generator
        self._settled = settled
        self._metrics = metrics
        self._tracing = tracing
        self._mailbox = mailbox
        self._served: dict[int, _Served] = {}  # under way, by number
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._of: dict[Request, _Served] = {}
        self._room = asyncio.Semaphore(2 * MOST_UNDER_WAY)
        self._closed = False  # the call ends when nothing is under way
        self._draining = False
        self._told_of_drain = False
        self._failure: Exception | None = None  # of the call itself

    def drain(self) -> None:
        """Begins no more requests, and ends the call as soon as none is under way."""
        self._draining = True
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._mailbox.post(None)

    async def run(
        self,
        messages: AsyncIterator[pb.GenerateManyRequest],
        write: Write,
    ) -> None:
        """Serves the call to its end. If it is cancelled, so are its requests.

        Raises:
            CallError: the caller did not keep to the rules of such calls.
        """
        with self._settled.reading(partial(self._mailbox.post, None)) as reader:
            reading = asyncio.create_task(self._read(messages))
            try:
                await self._write(write, reader)
            finally:
                tasks = (reading, *self._tasks.values())
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._mailbox.clear()

    # ------------------------------------------------------------ from the caller

    async def _read(self, messages: AsyncIterator[pb.GenerateManyRequest]) -> None:
        last = -1
        try:
            async for message in messages:
                match message.WhichOneof("what"):
                    case "begin":
                        if message.id <= last:
                            raise InvalidArgument("id", f"{message.id} is not larger than {last}, which was before it")
                        last = message.id
                        await self._room.acquire()
                        self._begin(message.id, message.begin)
                    case "cancel":
                        if (task := self._tasks.get(message.id)) is not None:
                            task.cancel()
                    case _:
                        raise InvalidArgument("what", "one of begin and cancel must be set")
        except Exception as error:
            self._failure = error.with_traceback(None)
        self._close()

    def _begin(self, number: int, begin: pb.GenerateManyRequest.Begin) -> None:
        served = _Served(number)
        refusal = STOPS if self._draining else FULL if len(self._served) >= MOST_UNDER_WAY else None
        if refusal is not None:  # not under way: the call ends with those that are, however many are still asked for
            self._metrics.calls.labels(BEGIN, refusal.code.name).inc()
            self._end(served, refusal)
            return
        self._served[number] = served
        task = self._tasks[number] = asyncio.create_task(self._serve(served, begin))
        task.add_done_callback(partial(self._forget, served))

    def _forget(self, served: _Served, task: asyncio.Task[None]) -> None:
        del self._tasks[served.number]
        if served.done.done() and not served.done.cancelled():
            served.done.exception()  # else asyncio complains that nobody looked at it
        if task.cancelled():  # has no end to send
            served.ended = True
            self._mailbox.post(served)
        elif (bug := task.exception()) is not None:
            log.error("request failed", exc_info=bug)
            error = fault()
            self._metrics.calls.labels(BEGIN, error.code.name).inc()
            self._end(served, error)

    async def _serve(self, served: _Served, begin: pb.GenerateManyRequest.Begin) -> None:
        seconds = begin.timeout_seconds if begin.HasField("timeout_seconds") else None
        time_remaining, name = _clock(seconds), request_trace.full_name(MANY)
        try:
            CALLER.set(CALL_AGAIN.get()(BEGIN))
            trace = self._tracing.begin(name, begin.traceparent, request_trace.of_call(name))
            async with (
                accounted(self._metrics, BEGIN, trace, time_remaining),
                _deadline(seconds),
                self._generator.begin(begin.request, self._mailbox, trace) as generation,
            ):
                served.generation = generation
                served.in_columns = begin.reads_deltas and generation.plain
                served.may_settle = served.in_columns and all(map(self._settled.may_settle, generation.choices))
                self._of.update(dict.fromkeys(generation.choices, served))
                try:
                    self._say(served, Event(id=served.number, chunk=generation.prompt))
                    await served.done
                finally:
                    for choice in generation.choices:
                        del self._of[choice]
            self._end(served)
        except CallError as error:
            self._end(served, error.with_traceback(None))  # whose frames hold what is served, which holds it
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._end(served, fault())  # what it awaited was cancelled

    def _end(self, served: _Served, error: CallError | None = None) -> None:
        served.ended = True
        end = End() if error is None else End(code=error.code.value[0], message=error.message)
        self._say(served, Event(id=served.number, end=end))

    # ------------------------------------------------------------ to the caller

    def _say(self, served: _Served, event: Event) -> None:
        served.events += (event,)
        self._mailbox.post(served)

    async def _write(self, write: Write, reader: Reader) -> None:
        while self._failure is None and (self._served or not self._closed):
            items = await self._mailbox.take()
            message = Message()
            # Before the items, which have all that came after this of the same requests.
            for rows in self._settled.to_take(reader, MESSAGE_BYTES // DELTA_BYTES):
                if not message.empty:
                    message = await self._next_after(message, write)
                if (deltas := self._settled.take(reader, rows)) is not None:
                    message.add_deltas(deltas)
            if message.size >= MESSAGE_BYTES:
                message = await self._next_after(message, write)
            streams: list[Stream] = []  # that can be settled
            for item in items:
                served = self._of.get(item) if isinstance(item, Request) else item
                if served is None:
                    continue
                if served.events:
                    message.say(served.number, served.events)
                    served.events = ()
                if isinstance(item, Request):
                    self._advance(served, item, message, streams)
                elif served.ended:
                    self._leave(served)
                if message.size >= MESSAGE_BYTES:
                    message = await self._next_after(message, write)
            if streams:
                self._settled.settle(reader, streams)
            if not message.empty or self._draining > self._told_of_drain:
                await self._next_after(message, write)
        failure, self._failure = self._failure, None  # whose frames will hold this
        if failure is not None:
            raise failure

    async def _next_after(self, message: Message, write: Write) -> Message:
        """Sends the message, and returns the one to go on with."""
        self._told_of_drain = self._draining
        await write(message.finished(self._told_of_drain))
        return Message()

    def _advance(self, served: _Served, choice: Request, message: Message, streams: list[Stream]) -> None:
        """Adds what is new of a choice to the message, and the choice to the streams, if it can be settled now."""
        generation, failure = served.generation, None
        assert generation is not None
        try:
            if (news := generation.take(choice)) is not None:
                text, tokens, finish = news
                if served.in_columns and finish is None and served.number not in message.with_events:
                    message.add_delta(served.number, text, tokens if generation.want_token_ids else ())
                    if served.may_settle and self._comes_in_words(served, tokens) and generation.takes_words(choice):
                        streams.append(Stream(choice, served.number, generation.want_token_ids))
                else:
                    message.add_chunk(served.number, partial(generation.write, choice, news))
        except Exception as error:  # a bug, at the cost of this request alone
            failure = error
        if (failure is not None or generation.over) and not served.done.done():
            if failure := failure or generation.failure:
                served.done.set_exception(failure)
            else:
                served.done.set_result(None)

    def _comes_in_words(self, served: _Served, tokens: Sequence[int]) -> bool:
        """Whether so many words have come one by one that more of them can be expected."""
        served.words = served.words + 1 if len(tokens) == 1 and self._settled.is_word(tokens[0]) else 0
        return served.words >= SETTLING_WORDS

    def _leave(self, served: _Served) -> None:
        if not served.left:
            served.left = True
            self._served.pop(served.number, None)
            self._room.release()


def _clock(seconds: float | None) -> Callable[[], float | None]:
    """Tells how many seconds are left of those that begin now; None: there is no deadline."""
    if seconds is None:
        return lambda: None
    ends_at = time.monotonic() + seconds
    return lambda: ends_at - time.monotonic()


@asynccontextmanager
async def _deadline(seconds: float | None) -> AsyncIterator[None]:
    """
    Raises:
        CallError: the time that the caller gave the request is wrong, or over.
    """
    if seconds is not None and not 0 < seconds < math.inf:
        raise InvalidArgument("timeout_seconds", f"{seconds:g} is not a positive number")
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "the caller's deadline passed") from None
