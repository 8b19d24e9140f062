"""A request as workers are told of it: its tokens so far, and the hashes of their blocks.

What there is of the prompt alone is made once for all choices of a call.
"""

import grpc

from common import prefix_hash
from router.errors import CallError
from router.request import Kind, Prompt, Request, Told
from twostroke.v1 import worker_pb2

OTHER_WEIGHTS = (
    "the workers that began this answer are gone, and those that came serve other weights; it is safe to try again"
)


def hash_blocks(request: Request, kind: Kind) -> None:
    """Hashes the blocks that were not hashed before: all at first, and where the workers are of another kind now, then
    those with the tokens of the last attempt.

    Raises:
        CallError: UNAVAILABLE where part of the answer is of other weights.
    """
    if request.kind != kind:
        if request.output and request.kind is not None and request.kind.fingerprint != kind.fingerprint:
            raise CallError(grpc.StatusCode.UNAVAILABLE, OTHER_WEIGHTS)
        request.kind, request.block_hashes = kind, _told(request.prompt, kind).block_hashes
    hashes, prompt = request.block_hashes, request.prompt.token_ids
    if len(hashes) < request.length // kind.block_size:
        parent = hashes[-1] if hashes else _cache_root(request.prompt, kind)
        start = len(hashes) * kind.block_size
        tokens = (*prompt[start:], *request.output[max(start - len(prompt), 0) :])
        # a new list: the one before may be the prompt's
        request.block_hashes = hashes + prefix_hash.block_hashes(parent, tokens, kind.block_size)


def sequence_of(request: Request) -> worker_pb2.Sequence:
    """Of a request with hashed blocks."""
    assert request.kind is not None
    told = _told(request.prompt, request.kind)
    sequence = worker_pb2.Sequence()
    sequence.CopyFrom(_packed(request.prompt, request.kind, told))
    sequence.token_ids.extend(request.output)
    sequence.max_length = request.max_length
    if request.block_hashes is not told.block_hashes:
        sequence.block_hashes = b"".join(request.block_hashes)
    sequence.sampling.CopyFrom(request.sampling)
    sequence.request_id = request.id
    return sequence


def _told(prompt: Prompt, kind: Kind) -> Told:
    told = prompt.told.get(kind)
    if told is None:
        prompt.told.clear()  # nobody is left who knows the prompt by these
        hashes = prefix_hash.block_hashes(_cache_root(prompt, kind), prompt.token_ids, kind.block_size)
        told = prompt.told[kind] = Told(hashes)
    return told


def _packed(prompt: Prompt, kind: Kind, told: Told) -> worker_pb2.Sequence:
    packed = told.packed
    if not packed.token_ids:
        packed.token_ids.extend(prompt.token_ids)
        packed.prompt_length = len(prompt.token_ids)
        packed.block_hashes = b"".join(told.block_hashes)
        packed.min_length = prompt.min_length
        packed.stop_token_ids.extend(sorted(prompt.stop_token_ids))
        packed.cache_root = _cache_root(prompt, kind)
        packed.grammar = prompt.grammar
    return packed


def _cache_root(prompt: Prompt, kind: Kind) -> bytes:
    return prefix_hash.cache_root(kind.fingerprint, prompt.cache_salt)
