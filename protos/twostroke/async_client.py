"""The client for asyncio."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from twostroke.async_shared_call import AsyncSharedCall
from twostroke.channel import (
    DEFAULT_TARGET,
    HEALTH_FROM_BYTES,
    HEALTH_OF_INFERENCE,
    HEALTH_TO_BYTES,
    HEALTH_WATCH,
    NO_WORKERS,
    NOBODY,
    SERVING,
    checked,
    credentials_of,
    metadata_of,
    not_ready,
    options_of,
    seconds,
    seconds_of,
)
from twostroke.chat import ChatOptions, Messages
from twostroke.errors import closed, error_of, unusable
from twostroke.request import Options, Prompt, chat_request, detokenize_request, generate_request, tokenize_request
from twostroke.results import Generation, Piece, generation_of, piece_of
from twostroke.shared_call import MOST_BYTES, Refused
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:  # the stub is one class at run time, and two to the type checker
    from twostroke.v1.inference_pb2_grpc import InferenceAsyncStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncClient:
    """A connection to a Twostroke router, for one event loop; connects at its first call. `Client` says what the
    arguments mean.

    Example:
        async with AsyncClient("localhost:8600") as client:
            async for piece in client.stream("The capital of France is", max_tokens=64):
                print(piece.text, end="", flush=True)
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        tls: bool | grpc.ChannelCredentials = False,
        tls_server_name: str | None = None,
        timeout: float | None = None,
        share_call: bool = False,
    ) -> None:
        self._share_call = share_call
        self._credentials = credentials_of(tls, tls_server_name)
        self._options = options_of(target, tls_server_name)
        self._metadata = metadata_of(api_key)
        self._timeout = None if timeout is None else seconds(timeout)
        self._target = checked(target)

    # Channels of grpc.aio belong to the event loop that runs when they are made, and clients are often made before it.
    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        if self._credentials:
            return grpc.aio.secure_channel(self._target, self._credentials, options=self._options)
        return grpc.aio.insecure_channel(self._target, options=self._options)

    @cached_property
    def _stub(self) -> "InferenceAsyncStub":
        return InferenceStub(self._channel)

    @cached_property
    def _shared(self) -> AsyncSharedCall:
        return AsyncSharedCall(lambda: self._stub.GenerateMany(metadata=self._metadata))

    async def close(self) -> None:
        """Cancels what is under way and closes the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Generation:
        """The whole answer at once.

        Example:
            (await client.generate("One, two,", max_tokens=8, temperature=0)).text
        """
        return generation_of(await self._unary(self._stub.Generate, generate_request(prompt, options), timeout))

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Piece, None]:
        """The answer as it is made. Leaving the loop cancels the rest of it.

        Example:
            async for piece in client.stream("One, two,", stop="ten"):
                print(piece.text, end="", flush=True)
        """
        return self._pieces(generate_request(prompt, options), timeout)

    async def chat(
        self, messages: str | Messages, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Generation:
        """The answer to a chat, rendered with the model's own template; a lone string is the user's first message.

        Example:
            (await client.chat([{"role": "user", "content": "Who wrote Faust?"}], max_tokens=64)).text
        """
        return generation_of(await self._unary(self._stub.Generate, chat_request(messages, options), timeout))

    def stream_chat(
        self, messages: str | Messages, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Piece, None]:
        """The answer to a chat as it is made; see `stream`.

        Example:
            async for piece in client.stream_chat("Tell me a joke."):
                print(piece.text, end="", flush=True)
        """
        return self._pieces(chat_request(messages, options), timeout)

    async def tokenize(
        self,
        prompt: str | Messages,
        *,
        add_special_tokens: bool = True,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> tuple[int, ...]:
        """The token ids of a text, or of a chat as the model's template renders it; the options are those of a chat."""
        request = tokenize_request(prompt, add_special_tokens, options)
        return tuple((await self._unary(self._stub.Tokenize, request, timeout)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, special_tokens: bool = False, timeout: float | None = None
    ) -> str:
        """The text of token ids; with `special_tokens`, those such as <|im_end|> stay in it."""
        request = detokenize_request(token_ids, special_tokens)
        return (await self._unary(self._stub.Detokenize, request, timeout)).text

    async def model(self, *, timeout: float | None = None) -> pb.GetModelResponse:
        """What is served, and its limits."""
        return await self._unary(self._stub.GetModel, pb.GetModelRequest(), timeout)

    async def load(self, *, timeout: float | None = None) -> pb.GetLoadResponse:
        """How busy the cluster is, per worker."""
        return await self._unary(self._stub.GetLoad, pb.GetLoadRequest(), timeout)

    async def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Returns as soon as the router has a pair of workers that can serve; it need not even run yet.

        Raises:
            DeadlineExceeded: that took longer than `timeout` seconds; the message says what was missing.
        """
        reason = NOBODY
        watch: grpc.aio.UnaryStreamMultiCallable[StringValue, Int32Value]
        watch = self._channel.unary_stream(HEALTH_WATCH, HEALTH_TO_BYTES, HEALTH_FROM_BYTES)
        deadline = time.monotonic() + seconds(timeout)
        while (left := deadline - time.monotonic()) > 0:
            with _closing_as_error():
                call = watch(HEALTH_OF_INFERENCE, timeout=seconds_of(left, None), metadata=self._metadata)
            try:
                with _closing_as_error():
                    async for status in call:
                        if status.value == SERVING:
                            return
                        reason = NO_WORKERS
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    reason = error.details() or NOBODY
                elif time.monotonic() < deadline:
                    raise error_of(error) from error
            finally:
                call.cancel()
            await asyncio.sleep(min(0.1, max(0.0, deadline - time.monotonic())))
        raise not_ready(self._target, timeout, reason)

    async def _unary(
        self, method: "grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]", request: _Request, timeout: float | None
    ) -> _Response:
        timeout = seconds_of(timeout, self._timeout)
        try:
            with _closing_as_error():
                return await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_of(error, timeout) from error

    async def _pieces(self, request: pb.GenerateRequest, timeout: float | None) -> AsyncGenerator[Piece, None]:
        timeout, began = seconds_of(timeout, self._timeout), time.monotonic()
        if self._share_call and request.ByteSize() <= MOST_BYTES:
            try:
                with _closing_as_error():
                    async with aclosing(self._shared.pieces(request, timeout)) as pieces:
                        async for piece in pieces:
                            yield piece
                return
            except Refused:
                pass
        left = None if timeout is None else timeout - (time.monotonic() - began)
        with _closing_as_error():
            call = self._stub.GenerateStream(request, timeout=left, metadata=self._metadata)
        try:
            with _closing_as_error():
                async for chunk in call:
                    yield piece_of(chunk)
        except grpc.aio.AioRpcError as error:
            raise error_of(error, timeout) from error
        finally:
            call.cancel()


@contextmanager
def _closing_as_error() -> Iterator[None]:
    """A call whose client is closed ends with an error, as the sync client's. For one under way gRPC raises what a task
    raises that is cancelled itself: its caller would take that for its own doing, and a task group would pass over
    it."""
    try:
        yield
    except grpc.aio.UsageError as error:
        raise unusable() from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise closed() from error
