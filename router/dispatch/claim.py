"""The claim of the first request in the queue to room on a decode worker."""

import time
from collections.abc import Iterable

from router.cluster.worker import Worker
from router.dispatch.request import Request

# Seconds that a request is the first before it claims room. One that needs as little as others do is never so for long,
# however many routers there are.
PATIENCE = 1.0
# Seconds after which a claim is repeated. A worker forgets it if it has not heard of it for ten times as long.
REPEATED = 1.0


class Claim:
    """Has one decode worker keep room from other routers' requests, which would take it bit by bit. This router's own
    wait behind the first one anyway."""

    def __init__(self) -> None:
        self._request: Request | None = None
        self._since = 0.0  # time.monotonic()
        self._worker: Worker | None = None  # that was told
        self._told_at = 0.0  # time.monotonic()

    @property
    def is_open(self) -> bool:
        """Whether there may be something to withdraw: `first_is` has named a request since it last named none."""
        return self._request is not None

    def first_is(self, request: Request | None) -> None:
        """Which request is the first now; None if the queue is empty. The claim of the one before it is withdrawn, but
        not before the worker has taken that one in, as it may still refuse it."""
        if request is not self._request and not self._is_unanswered():
            self._withdraw()
            self._request, self._since = request, time.monotonic()

    def no_room_for(self, request: Request, tokens: int, workers: Iterable[Worker]) -> None:
        """None of these decode workers has room for `tokens` tokens now."""
        now = time.monotonic()
        if request is not self._request or now - self._since < PATIENCE:
            return
        able = [worker for worker in workers if worker.can_hold(request.max_length)]
        if self._worker not in able:
            self._withdraw()
            self._worker = max(able, key=lambda worker: (not worker.circuit.paused, worker.room), default=None)
        elif now - self._told_at < REPEATED:
            return
        if self._worker is not None:
            self._worker.send_claim(self._worker.blocks(tokens))
            self._told_at = now

    def _is_unanswered(self) -> bool:
        attempt = None if self._request is None else self._request.attempt
        return attempt is not None and attempt.decode is not None and not attempt.reserved

    def _withdraw(self) -> None:
        if self._worker is not None:
            self._worker.send_claim(0)
            self._worker = None
