"""Checks workers' messages. A worker that breaks the protocol is disconnected, and its requests resume elsewhere."""

import math

from common.kv import cache_changes
from common.kv.prefix_hash import HASH_BYTES
from router.validate import MAX_LOGPROBS
from twostroke.v1 import worker_pb2

NO_LOGPROBS = "a token came without the log-probabilities that were asked for"


class WorkerFault(Exception):
    """A worker broke the protocol; the sentence says how."""


def check(message: worker_pb2.WorkerMessage, vocab_size: int) -> None:
    """
    Raises:
        WorkerFault: the message contradicts itself or the model, so that none of it can be trusted.
    """
    tokens = message.tokens
    count = len(tokens.attempt_ids)
    if len(tokens.token_ids) != count or len(tokens.logprobs) not in (0, count):
        raise WorkerFault(
            f"tokens of {count} attempts came as {len(tokens.token_ids)} tokens with {len(tokens.logprobs)} logprobs"
        )
    if count and max(tokens.token_ids) >= vocab_size:
        raise WorkerFault(f"token {max(tokens.token_ids)} is not in the vocabulary of {vocab_size}")
    for logprobs in tokens.logprobs:
        _check_logprobs(logprobs, vocab_size)
    for prefilled in message.prefilled:
        if prefilled.first_token >= vocab_size:
            raise WorkerFault(f"first token {prefilled.first_token} is not in the vocabulary of {vocab_size}")
        _check_logprobs(prefilled.logprobs, vocab_size)
    for started in message.started:
        if not (math.isfinite(started.transfer_ms) and started.transfer_ms >= 0):
            raise WorkerFault(f"a transfer took {started.transfer_ms} ms")
    for ended in message.ended:
        if ended.cause not in worker_pb2.Ended.Cause.values():
            raise WorkerFault(f"an attempt ended of the unknown cause {ended.cause}")
    for changes in cache_changes.of(message):
        for hashes in (changes.published, changes.dropped):
            if len(hashes) % HASH_BYTES:
                raise WorkerFault(f"hashes of {HASH_BYTES} bytes came as {len(hashes)} bytes")


def check_location(kv: worker_pb2.KvLocation, pool: worker_pb2.PoolHandle, blocks: int) -> None:
    """Of KV that a worker with this pool says it has in so many blocks. That is passed on: what a decode worker cannot
    use, or its stream cannot carry, would be taken for that worker's fault.

    Raises:
        WorkerFault: it is elsewhere, or in more or fewer blocks.
    """
    named, generations = len(kv.block_ids), len(kv.generations)
    if named != blocks or generations != blocks:
        raise WorkerFault(f"KV of {blocks} blocks came as {named} blocks with {generations} generations")
    if kv.pool != pool:
        raise WorkerFault("the KV that it names is not in its own pool")


def _check_logprobs(logprobs: worker_pb2.Logprobs, vocab_size: int) -> None:
    top = logprobs.top_ids
    if len(top) != len(logprobs.top_logprobs) or len(top) > MAX_LOGPROBS:
        raise WorkerFault(f"{len(top)} likeliest tokens came with {len(logprobs.top_logprobs)} logprobs")
    if top and max(top) >= vocab_size:
        raise WorkerFault(f"token {max(top)} is not in the vocabulary of {vocab_size}")
