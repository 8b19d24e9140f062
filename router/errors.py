"""What ends a call with a gRPC status instead of an answer."""

import grpc

# A sentence travels in the call's trailers, which are limited (to 8 KiB) and spell out each byte that is not ASCII.
MAX_SENTENCE = 400


class CallError(Exception):
    """A status code and a sentence that a person can act on. A longer one, which quotes what somebody sent, is cut."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        if len(message) > MAX_SENTENCE:
            message = f"{message[: MAX_SENTENCE - 1]}…"
        super().__init__(message)
        self.code = code
        self.message = message


class InvalidArgument(CallError):
    """A field of the request is wrong; the sentence says which, and what its limit is."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {problem}")
