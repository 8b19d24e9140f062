"""Several messages of a worker to a router as one, which does what they do one after the other."""

from collections.abc import Sequence

from common.kv import cache_changes
from twostroke.v1 import worker_pb2 as pb


def most_that_join(messages: Sequence[pb.WorkerMessage]) -> int:
    """How many of the first messages can become one; at least 1."""
    count, has_load = 0, False
    logprobs: bool | None = None  # whether the tokens have any
    for number, message in enumerate(messages, 1):
        if any(changes.snapshot for changes in cache_changes.of(message)):  # takes the place of what was known before
            break
        if message.HasField("tokens"):
            if logprobs is not None and logprobs != bool(message.tokens.logprobs):
                break  # all tokens of a message have them, or none
            logprobs = bool(message.tokens.logprobs)
        has_load = has_load or message.HasField("load")
        if message.HasField("load") or not has_load:  # a load counts in everything else in its message
            count = number
    return max(count, 1)


def join(messages: Sequence[pb.WorkerMessage]) -> pb.WorkerMessage:
    """One message out of several that can become one; changes the first. What happened to an attempt keeps its order:
    routers take a message's fields in the order in which an attempt's life goes. Different attempts may change places.
    """
    whole, *later = messages
    if not later:
        return whole
    of_pools: list[dict[bytes, bool]] = [{} for _ in cache_changes.FIELDS]
    for message in messages:
        for changes, noted in zip(cache_changes.of(message), of_pools, strict=True):
            cache_changes.note(noted, changes)
    for message in later:
        whole.ClearField("load")
        whole.MergeFrom(message)
    for changes, noted in zip(cache_changes.of(whole), of_pools, strict=True):
        if noted:
            changes.CopyFrom(cache_changes.pack(noted))
    return whole
