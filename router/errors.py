"""Errors that end a call with a gRPC status."""

import grpc

# Characters. The sentence is sent in the call's trailers, which may have 8 KiB, percent-encoded where it is not ASCII.
MAX_SENTENCE = 400


class CallError(Exception):
    """A status code, and a sentence that a person can act on. The sentence is cut if what it quotes makes it too
    long."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        if len(message) > MAX_SENTENCE:
            message = f"{message[: MAX_SENTENCE - 1]}…"
        super().__init__(message)
        self.code = code
        self.message = message


class InvalidArgument(CallError):
    """A field of the request is wrong. The sentence says which one, and what is allowed."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {problem}")


class Exhausted(CallError):
    """A limit is reached. The sentence says which one."""

    def __init__(self, sentence: str, seconds: float | None = None) -> None:
        when = "later" if seconds is None else f"in {seconds:.1f} s"
        super().__init__(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{sentence}; try again {when}")


def fault() -> CallError:
    """A bug of the router, which has been logged."""
    return CallError(grpc.StatusCode.INTERNAL, "a fault of the router; its log says more")


def at_most(field: str, most: int, count: int, of: str = "bytes") -> None:
    """
    Raises:
        InvalidArgument: the field has more than `most`.
    """
    if count > most:
        raise InvalidArgument(field, f"has {count} {of}; at most {most} are allowed")
