"""The client for programs without an event loop."""

import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Self, TypeVar, Unpack

import grpc

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
from twostroke.errors import error_of, unusable
from twostroke.request import Options, Prompt, chat_request, detokenize_request, generate_request, tokenize_request
from twostroke.results import Generation, Piece, generation_of, piece_of
from twostroke.shared_call import MOST_BYTES, Refused
from twostroke.sync_shared_call import SyncSharedCall
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1.inference_pb2_grpc import InferenceStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Client:
    """A connection to a Twostroke router. Safe to share between threads; connects at its first call.

    Example:
        with Client("localhost:8600") as client:
            for piece in client.stream("The capital of France is", max_tokens=64):
                print(piece.text, end="", flush=True)

    Args:
        target: the router, host:port, or another name that gRPC knows. With dns:///NAME:8600 and
            ipv4:10.0.0.1:8600,10.0.0.2:8600, the addresses that can be reached take turns.
        api_key: sent with every call as `authorization: Bearer ...`.
        tls: True for TLS with the system's certificate authorities, or credentials of your own.
        tls_server_name: the name in the router's certificate, where it is not the target's host.
        timeout: seconds that a call may take where it names none; None is for ever, as is infinity in a call.
        share_call: streamed answers share one call, so that tokens which come at the same time come in one message:
            with many at once, that saves most of what they cost this process and the router. What is not read as fast
            as it comes waits in this process.

    Raises:
        InvalidArgument: the target is no such thing, the key has a character that cannot be sent, or there is a
            tls_server_name without tls.
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
        self._target = checked(target)
        credentials, channel_options = credentials_of(tls, tls_server_name), options_of(target, tls_server_name)
        self._channel = (
            grpc.secure_channel(target, credentials, options=channel_options)
            if credentials
            else grpc.insecure_channel(target, options=channel_options)
        )
        self._stub = InferenceStub(self._channel)
        self._watch = self._channel.unary_stream(HEALTH_WATCH, HEALTH_TO_BYTES, HEALTH_FROM_BYTES)
        self._metadata = metadata_of(api_key)
        self._timeout = None if timeout is None else seconds(timeout)
        self._shared: SyncSharedCall | None = None
        if share_call:
            self._shared = SyncSharedCall(partial(_open, self._stub, self._metadata))
            # The call's thread would keep a channel open whose client is forgotten.
            weakref.finalize(self, self._channel.close)

    def close(self) -> None:
        """Cancels what is under way and closes the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Generation:
        """The whole answer at once.

        Example:
            client.generate("One, two,", max_tokens=8, temperature=0).text
        """
        return generation_of(self._unary(self._stub.Generate, generate_request(prompt, options), timeout))

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Generator[Piece, None, None]:
        """The answer as it is made. Leaving the loop cancels the rest of it.

        Example:
            for piece in client.stream("One, two,", stop="ten"):
                print(piece.text, end="", flush=True)
        """
        return self._pieces(generate_request(prompt, options), timeout)

    def chat(self, messages: str | Messages, *, timeout: float | None = None, **options: Unpack[Options]) -> Generation:
        """The answer to a chat, rendered with the model's own template; a lone string is the user's first message.

        Example:
            client.chat([{"role": "user", "content": "Who wrote Faust?"}], max_tokens=64).text
        """
        return generation_of(self._unary(self._stub.Generate, chat_request(messages, options), timeout))

    def stream_chat(
        self, messages: str | Messages, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Generator[Piece, None, None]:
        """The answer to a chat as it is made; see `stream`.

        Example:
            for piece in client.stream_chat("Tell me a joke."):
                print(piece.text, end="", flush=True)
        """
        return self._pieces(chat_request(messages, options), timeout)

    def tokenize(
        self,
        prompt: str | Messages,
        *,
        add_special_tokens: bool = True,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> tuple[int, ...]:
        """The token ids of a text, or of a chat as the model's template renders it; the options are those of a chat."""
        return tuple(
            self._unary(self._stub.Tokenize, tokenize_request(prompt, add_special_tokens, options), timeout).token_ids
        )

    def detokenize(
        self, token_ids: Sequence[int], *, special_tokens: bool = False, timeout: float | None = None
    ) -> str:
        """The text of token ids; with `special_tokens`, those such as <|im_end|> stay in it."""
        request = detokenize_request(token_ids, special_tokens)
        return self._unary(self._stub.Detokenize, request, timeout).text

    def model(self, *, timeout: float | None = None) -> pb.GetModelResponse:
        """What is served, and its limits."""
        return self._unary(self._stub.GetModel, pb.GetModelRequest(), timeout)

    def load(self, *, timeout: float | None = None) -> pb.GetLoadResponse:
        """How busy the cluster is, per worker."""
        return self._unary(self._stub.GetLoad, pb.GetLoadRequest(), timeout)

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Returns as soon as the router has a pair of workers that can serve; it need not even run yet.

        Raises:
            DeadlineExceeded: that took longer than `timeout` seconds; the message says what was missing.
        """
        reason = NOBODY
        deadline = time.monotonic() + seconds(timeout)
        while (left := deadline - time.monotonic()) > 0:
            with _closed_as_error():
                watch = self._watch(HEALTH_OF_INFERENCE, timeout=seconds_of(left, None), metadata=self._metadata)
            try:
                for status in watch:
                    if status.value == SERVING:
                        return
                    reason = NO_WORKERS
            except grpc.RpcError as error:
                if watch.code() is grpc.StatusCode.UNAVAILABLE:
                    reason = watch.details() or NOBODY
                elif time.monotonic() < deadline:
                    raise error_of(watch) from error
            finally:
                watch.cancel()
            time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))
        raise not_ready(self._target, timeout, reason)

    def _unary(
        self, method: "grpc.UnaryUnaryMultiCallable[_Request, _Response]", request: _Request, timeout: float | None
    ) -> _Response:
        timeout = seconds_of(timeout, self._timeout)
        try:
            with _closed_as_error():
                return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, timeout) from error

    def _pieces(self, request: pb.GenerateRequest, timeout: float | None) -> Generator[Piece, None, None]:
        timeout, began = seconds_of(timeout, self._timeout), time.monotonic()
        if self._shared is not None and request.ByteSize() <= MOST_BYTES:
            try:
                yield from self._shared.pieces(request, timeout)
                return
            except Refused:
                pass
        left = None if timeout is None else timeout - (time.monotonic() - began)
        with _closed_as_error():
            call = self._stub.GenerateStream(request, timeout=left, metadata=self._metadata)
        try:
            for chunk in call:
                yield piece_of(chunk)
        except grpc.RpcError as error:
            raise error_of(call, timeout) from error
        finally:
            call.cancel()


def _open(
    stub: InferenceStub, metadata: tuple[tuple[str, str], ...], requests: Iterator[pb.GenerateManyRequest]
) -> "grpc._CallIterator[pb.GenerateManyResponse]":
    with _closed_as_error():
        return stub.GenerateMany(requests, metadata=metadata)


@contextmanager
def _closed_as_error() -> Iterator[None]:
    """gRPC has only a ValueError for a call on a channel that is closed, and also for wrong values."""
    try:
        yield
    except ValueError as error:
        if "closed" in str(error):
            raise unusable() from error
        raise
