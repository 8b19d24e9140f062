"""Requests that no worker has: resumed ones first, each kind in the order of arrival."""

import heapq

from router.request import Request, State


class WaitingQueue:
    """A request that is dropped while it waits is only counted out, and left for `first` to pass over; when most of the
    heap is such, it is swept."""

    def __init__(self) -> None:
        self._heap: list[tuple[bool, int, Request]] = []
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.resumes == 0, request.serial, request))
        self._waiting += 1

    def first(self) -> Request | None:
        while self._heap:
            request = self._heap[0][2]
            if request.state is State.QUEUED:
                return request
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Request:
        self._waiting -= 1
        return heapq.heappop(self._heap)[2]

    def dropped(self) -> None:
        """Tells that a waiting request's state has just become another than QUEUED."""
        self._waiting -= 1
        if len(self._heap) > 2 * self._waiting + 64:
            self._heap = [entry for entry in self._heap if entry[2].state is State.QUEUED]
            heapq.heapify(self._heap)

    def clear(self) -> list[Request]:
        """Takes every request out, in order."""
        requests = [entry[2] for entry in sorted(self._heap, key=lambda entry: entry[:2])]
        self._heap, self._waiting = [], 0
        return [request for request in requests if request.state is State.QUEUED]
