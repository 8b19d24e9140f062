"""Requests that no worker has: resumed ones first, each kind in the order of arrival."""

from bisect import bisect_left, insort

from router.request import Request


class WaitingQueue:
    """A sorted list: it is as long as the router's queue may get, and is read from the front."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def push(self, request: Request) -> None:
        insort(self._requests, request, key=_order)

    def at(self, place: int) -> Request | None:
        """The request that so many are before; None where fewer wait."""
        return self._requests[place] if place < len(self._requests) else None

    def remove(self, request: Request) -> None:
        place = bisect_left(self._requests, _order(request), key=_order)
        assert self._requests[place] is request
        del self._requests[place]

    def clear(self) -> list[Request]:
        """Takes every request out, in order."""
        requests, self._requests = self._requests, []
        return requests


def _order(request: Request) -> tuple[bool, int]:
    """The same for as long as the request is in here: only an attempt that ends is a resume."""
    return request.resumes == 0, request.serial
