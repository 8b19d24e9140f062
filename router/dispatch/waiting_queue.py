"""The requests that wait for workers: resumed ones first, then the others, each in order of arrival."""

from bisect import bisect_left, insort

from router.dispatch.request import Request


class WaitingQueue:
    """A sorted list, which is fast enough for the length that the router's queue may have.

    Attributes:
        prompt_tokens: of all that waits; a prompt that several choices share is counted with the first of them.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self.prompt_tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    def push(self, request: Request) -> None:
        insort(self._requests, request, key=_order)
        self.prompt_tokens += _prompt_tokens(request)

    def at(self, place: int) -> Request | None:
        """The request at an index, 0 being the front; None if the queue is shorter."""
        return self._requests[place] if place < len(self._requests) else None

    def remove(self, request: Request) -> None:
        place = bisect_left(self._requests, _order(request), key=_order)
        assert self._requests[place] is request
        del self._requests[place]
        self.prompt_tokens -= _prompt_tokens(request)

    def clear(self) -> list[Request]:
        """Removes all requests, and returns them in order."""
        requests, self._requests = self._requests, []
        self.prompt_tokens = 0
        return requests


def _order(request: Request) -> tuple[bool, int]:
    """Does not change while the request is queued: `resumes` only grows when an attempt ends."""
    return request.resumes == 0, request.serial


def _prompt_tokens(request: Request) -> int:
    return 0 if request.index else len(request.prompt.token_ids)
