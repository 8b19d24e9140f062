"""One packed message of a decode step, to the requests' buffers: the router's hottest loop."""

from collections.abc import Mapping

from router.request import Request
from router.worker_faults import NO_LOGPROBS, WorkerFault
from twostroke.v1 import worker_pb2


def fan_out(decoding: Mapping[int, Request], tokens: worker_pb2.StepTokens) -> None:
    """Gives every token to the request that it is for. Attempts that ended in the meantime are passed over, and what
    comes after a request's last token.

    Raises:
        WorkerFault: a request asked for log-probabilities, and there are none.
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
