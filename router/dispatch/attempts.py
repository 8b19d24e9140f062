"""The attempts under way: how they begin and end on the workers that hold something for them."""

import itertools
import random
import time

from router import request_trace
from router.cluster.worker import Worker
from router.dispatch import choose
from router.dispatch.request import Attempt, Request, State
from twostroke.v1 import worker_pb2


class Attempts:
    def __init__(self) -> None:
        self._ids = itertools.count(random.getrandbits(62))
        self._under_way: dict[int, Attempt] = {}  # by id

    def __len__(self) -> int:
        return len(self._under_way)

    def under_way(self) -> list[Attempt]:
        return list(self._under_way.values())

    def new(self, request: Request, pair: choose.Pair, headroom: int) -> Attempt:
        """An attempt at `request` that has yet to begin, with room for `headroom` more tokens."""
        computing = pair.prefill or pair.decode
        assert computing is not None
        request.attempts += 1
        return Attempt(
            id=next(self._ids),
            request=request,
            prefill=pair.prefill,
            decode=pair.decode,
            prefill_tokens=computing.missing_tokens(request),
            decode_blocks=pair.decode.new_blocks(request, request.length + headroom) if pair.decode else 0,
            in_place=pair.prefill is None,
            length=request.length,
            trace=request_trace.attempt(request, pair.prefill, pair.decode),
        )

    def begin(self, attempt: Attempt, sequence: worker_pb2.Sequence, headroom: int) -> None:
        """Sends the attempt to its workers. `sequence` is its request as they take it."""
        request, prefill, decode = attempt.request, attempt.prefill, attempt.decode
        request.attempt = attempt
        request.state = State.DISPATCHED
        request.recheck_length = None
        request.timing.queued_ms += 1000 * (attempt.dispatched_at - request.queued_at)
        self._under_way[attempt.id] = attempt
        if prefill is not None:
            prefill.begin(attempt)
            prefill.send_prefill(
                worker_pb2.Prefill(
                    attempt_id=attempt.id,
                    uncached_tokens=attempt.prefill_tokens,
                    traceparent=attempt.trace.traceparent,
                ),
                sequence,
            )
        if decode is not None:
            decode.begin(attempt)
            decode.reserve(attempt.decode_blocks)
            decode.send_reserve(
                worker_pb2.Reserve(
                    attempt_id=attempt.id,
                    headroom_tokens=headroom,
                    prefill=attempt.in_place,
                    traceparent=attempt.trace.traceparent,
                ),
                sequence,
            )

    def close(self, attempt: Attempt, outcome: str, problem: str = "") -> None:
        """Ends the attempt on each worker that still holds something for it.

        Args:
            outcome: for its trace.
            problem: what went wrong, if something did; for its trace.
        """
        leave_prefill(attempt, tell=True)
        leave_decode(attempt, tell=True)
        tokens = attempt.request.length - attempt.length
        attempt.trace.end({"twostroke.outcome": outcome, "twostroke.output_tokens": tokens}, problem)
        attempt.request.attempt = None
        del self._under_way[attempt.id]


def decoding_began(attempt: Attempt) -> None:
    """The KV is in place."""
    request = attempt.request
    attempt.decoding_since = time.monotonic()
    if request.decode_cached_tokens is None:
        # An attempt that goes on behind output counts cached blocks with output in them, too.
        request.decode_cached_tokens = min(attempt.decode_cached_tokens, len(request.prompt.token_ids))


def leave(worker: Worker, attempt: Attempt) -> None:
    """The attempt has ended on `worker`, which knows it."""
    if attempt.prefill is worker:
        leave_prefill(attempt, tell=False)
    else:
        leave_decode(attempt, tell=False)


def leave_prefill(attempt: Attempt, *, tell: bool) -> None:
    """Its prefill worker, if it has one, holds nothing for it any more. `tell`: the worker has yet to know that."""
    worker, attempt.prefill = attempt.prefill, None
    if worker is None:
        return
    worker.end(attempt)
    if tell:
        worker.send_ended(attempt.id)


def leave_decode(attempt: Attempt, *, tell: bool) -> None:
    """As `leave_prefill`, of its decode worker."""
    worker, attempt.decode = attempt.decode, None
    if worker is None:
        return
    worker.end(attempt)
    if not attempt.reserved:
        worker.reservation_answered(attempt.decode_blocks)
    worker.release(attempt.decode_blocks)
    if attempt.decoding_since is not None:
        attempt.request.timing.decode_ms += 1000 * (time.monotonic() - attempt.decoding_since)
        attempt.trace.record("decode", attempt.decoding_since, {})
    if tell:
        worker.send_ended(attempt.id)
