"""The requests that wait for workers: resumed ones first, then the others, each in order of arrival."""

from bisect import bisect_left, insort

from router.dispatch.request import Request


class WaitingQueue:
    """A sorted list, which is fast enough for the length that the router's queue may have."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def push(self, request: Request) -> None:
        insort(self._requests, request, key=_order)

    def at(self, place: int) -> Request | None:
        """The request at an index, 0 being the front; None if the queue is shorter."""
        return self._requests[place] if place < len(self._requests) else None

    def remove(self, request: Request) -> None:
        place = bisect_left(self._requests, _order(request), key=_order)
        assert self._requests[place] is request
        del self._requests[place]

    def clear(self) -> list[Request]:
        """Removes all requests, and returns them in order."""
        requests, self._requests = self._requests, []
        return requests


def _order(request: Request) -> tuple[bool, int]:
    """Does not change while the request is queued: `resumes` only grows when an attempt ends."""
    return request.resumes == 0, request.serial
