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

    def settle(self, attempt_id: int, settled: Settled, row: int) -> None:
        self.settled = settled
        self.rows[attempt_id] = row

    def unsettle(self, attempt_id: int) -> None:
        """The request goes on as any other; see `Settled.leave`."""
        row = self.rows.pop(attempt_id, None)
        if row is not None:
            assert self.settled is not None
            self.settled.leave(row)

    def end(self, attempt_id: int) -> None:
        self.unsettle(attempt_id)
        self.requests.pop(attempt_id, None)
