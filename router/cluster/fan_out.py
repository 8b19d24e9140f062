"""Adds the tokens of decode steps, which come in one message, to their requests. This is the router's hottest loop."""

from collections.abc import Mapping

from router.cluster.worker_faults import NO_LOGPROBS, WorkerFault
from router.dispatch.request import Request
from twostroke.v1 import worker_pb2


def fan_out(decoding: Mapping[int, Request], tokens: worker_pb2.StepTokens) -> None:
    """Adds each token to its request. Tokens of attempts that have ended are ignored, and those after a request's last.

    Args:
        decoding: the requests that the worker decodes, by attempt id.

    Raises:
        WorkerFault: a request asked for log-probabilities, and the message has none.
    """
    find = decoding.get
    if tokens.logprobs:
        for attempt_id, token, logprobs in zip(tokens.attempt_ids, tokens.token_ids, tokens.logprobs, strict=True):
            request = find(attempt_id)
            if request is not None and not request.complete:
                if request.wants_logprobs:
                    request.add_logprobs(logprobs)
                request.add(token)
        return
    for attempt_id, token in zip(tokens.attempt_ids, tokens.token_ids, strict=True):
        request = find(attempt_id)
        if request is not None and not request.complete:
            if request.wants_logprobs:
                raise WorkerFault(NO_LOGPROBS)
            request.add(token)
