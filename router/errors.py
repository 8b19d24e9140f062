"""What ends a call with a gRPC status instead of an answer."""

import grpc


class CallError(Exception):
    """A status code and a sentence that a person can act on."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class InvalidArgument(CallError):
    """A field of the request is wrong; the sentence says which, and what its limit is."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {problem}")
