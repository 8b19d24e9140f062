"""The requests that one worker decodes."""

from router.dispatch.request import Request
from router.dispatch.settled import Settled


class Decoding:
    """
    Attributes:
        requests: by attempt id.
        rows: of those that are settled, by attempt id.
        settled: where they have these rows; None while no request of this worker has been settled.
    """

    __slots__ = ("requests", "rows", "settled")

    def __init__(self) -> None:
        self.requests: dict[int, Request] = {}
        self.rows: dict[int, int] = {}
        self.settled: Settled | None = None

    def unsettle(self, attempt_id: int) -> None:
        """If the request is settled, it goes on as any other."""
        if self.settled is not None and attempt_id in self.rows:
            self.settled.leave(self.rows[attempt_id])

    def end(self, attempt_id: int) -> None:
        self.unsettle(attempt_id)
        self.requests.pop(attempt_id, None)
