"""What calls of the client raise: one small hierarchy in place of gRPC's."""

from typing import Protocol

import grpc


class TwostrokeError(Exception):
    """A call that failed. `code` is gRPC's status code, `message` the sentence that came with it."""

    def __init__(self, message: str, code: grpc.StatusCode = grpc.StatusCode.UNKNOWN) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class InvalidArgument(TwostrokeError, ValueError):
    """The request is wrong; the message names the field and the limit."""


class Overloaded(TwostrokeError):
    """The router's queue is full, or a limit is reached: the message says which. Mostly worth trying again later."""


class Unavailable(TwostrokeError):
    """No router could be reached, or no worker could serve the request. Safe to retry."""


class DeadlineExceeded(TwostrokeError, TimeoutError):
    """The call's timeout passed before it was done."""


class Unauthenticated(TwostrokeError):
    """The API key is missing or wrong."""


_CLASSES: dict[grpc.StatusCode, type[TwostrokeError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
}


CLOSED = "Channel closed!"  # gRPC's words where the client itself was closed during a call
PASSED = "Deadline Exceeded"  # gRPC's words where the call's timeout passed


def refused(field: str, problem: str) -> InvalidArgument:
    """What to raise for a wrong value before anything is sent: in the router's words, as far as the client can tell."""
    return InvalidArgument(f"{field}: {problem}", grpc.StatusCode.INVALID_ARGUMENT)


def closed() -> TwostrokeError:
    return TwostrokeError("the client was closed before the call ended", grpc.StatusCode.CANCELLED)


def shut_down() -> TwostrokeError:
    return Unavailable("the router shut down; it is safe to try again", grpc.StatusCode.UNAVAILABLE)


def unusable() -> TwostrokeError:
    return TwostrokeError("the client is closed; further calls need a new one", grpc.StatusCode.CANCELLED)


class Status(Protocol):
    """What gRPC's sync and async errors have in common, beyond what `grpc.RpcError` declares."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...


def error_of(status: Status, timeout: float | None = None) -> TwostrokeError:
    """What to raise for a call that ended with this status, and that had so many seconds."""
    code, details = status.code(), status.details() or ""
    if code is grpc.StatusCode.CANCELLED:
        if CLOSED in details:
            return closed()
        return shut_down()  # gRPC's own word for calls of a server that shuts down
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and PASSED not in details:
        timeout = None
    return error_with(code, details, timeout)


def error_with(code: grpc.StatusCode, message: str, timeout: float | None = None) -> TwostrokeError:
    """What to raise for this status code; where it is that of a deadline, one of so many seconds."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and timeout is not None:
        message = f"the call did not end within its timeout of {timeout:g} s"
    return _CLASSES.get(code, TwostrokeError)(message or code.name, code)
