"""Adds the tokens of decode steps, which come in one message, to their requests. This is the router's hottest loop."""

from collections.abc import Sequence

from router.cluster.worker_faults import NO_LOGPROBS, WorkerFault
from router.dispatch.decoding import Decoding
from twostroke.v1 import worker_pb2


def fan_out(decoding: Decoding, tokens: worker_pb2.StepTokens) -> None:
    """Adds each token to its request. Tokens of attempts that have ended are ignored, and those after a request's last.

    Args:
        decoding: the requests that the worker decodes.

    Raises:
        WorkerFault: a request asked for log-probabilities, and the message has none.
    """
    attempt_ids, token_ids, logprobs = list(tokens.attempt_ids), list(tokens.token_ids), tokens.logprobs
    rest: Sequence[int] = range(len(token_ids))
    if decoding.settled is not None and decoding.rows:
        rest = decoding.settled.add(decoding.rows, attempt_ids, token_ids)
    find = decoding.requests.get
    for place in rest:
        attempt_id = attempt_ids[place]
        request = find(attempt_id)
        if request is None or request.complete:
            continue
        decoding.unsettle(attempt_id)
        if request.wants_logprobs:
            if not logprobs:
                raise WorkerFault(NO_LOGPROBS)
            request.add_logprobs(logprobs[place])
        request.add(token_ids[place])
