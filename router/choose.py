"""Which pair of workers a request goes to. Whoever wants a smarter choice, say by prefix, changes the two keys here."""

from collections.abc import Iterable

from router.request import Request
from router.worker import Worker


def prefill_worker(request: Request, workers: Iterable[Worker]) -> Worker | None:
    """The one with the fewest tokens before it; None while all have enough to do."""
    able = [worker for worker in workers if worker.can_hold(request.length + 1) and worker.accepts_prefill]
    return min(able, key=lambda worker: (worker.instance in request.avoid, worker.pending_tokens), default=None)


def decode_worker(request: Request, workers: Iterable[Worker], tokens: int) -> Worker | None:
    """The one with the most room left; None while none has room for so many tokens."""
    able = [worker for worker in workers if worker.can_hold(request.prompt.max_length) and worker.has_room(tokens)]
    return max(able, key=lambda worker: (worker.instance not in request.avoid, worker.room), default=None)
