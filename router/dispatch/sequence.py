"""A request as it is sent to workers: its tokens so far, and the hashes of their blocks.

The prompt's part is made once for all choices of a call.
"""

import grpc

from common.kv import prefix_hash
from router.dispatch.request import EncodedPrompt, Kind, Prompt, Request
from router.errors import CallError
from twostroke.v1 import worker_pb2

OTHER_WEIGHTS = (
    "the workers that began this answer are gone, and those that came serve other weights; it is safe to try again"
)


def hash_blocks(request: Request, kind: Kind) -> None:
    """Hashes the full blocks of the request that have no hash yet: all of them at first and after the workers' kind has
    changed, else those that the last attempt filled.

    Raises:
        CallError: UNAVAILABLE if part of the answer was generated with other weights.
    """
    if request.kind != kind:
        if request.output and request.kind is not None and request.kind.fingerprint != kind.fingerprint:
            raise CallError(grpc.StatusCode.UNAVAILABLE, OTHER_WEIGHTS)
        request.kind, request.block_hashes = kind, _encoded(request.prompt, kind).block_hashes
    hashes, prompt = request.block_hashes, request.prompt.token_ids
    if len(hashes) < request.length // kind.block_size:
        parent = hashes[-1] if hashes else _cache_root(request.prompt, kind)
        start = len(hashes) * kind.block_size
        tokens = (*prompt[start:], *request.output[max(start - len(prompt), 0) :])
        # A new list: the one before may be shared by all choices.
        request.block_hashes = hashes + prefix_hash.block_hashes(parent, tokens, kind.block_size)


def sequence_of(request: Request) -> worker_pb2.Sequence:
    """The request as a message. Its blocks must have been hashed."""
    assert request.kind is not None
    encoded = _encoded(request.prompt, request.kind)
    sequence = worker_pb2.Sequence()
    sequence.CopyFrom(_prompt_sequence(request.prompt, request.kind, encoded))
    sequence.token_ids.extend(request.output)
    sequence.max_length = request.max_length
    if request.block_hashes is not encoded.block_hashes:
        sequence.block_hashes = b"".join(request.block_hashes)
    sequence.sampling.CopyFrom(request.sampling)
    sequence.request_id = request.id
    return sequence


def _encoded(prompt: Prompt, kind: Kind) -> EncodedPrompt:
    encoded = prompt.encoded.get(kind)
    if encoded is None:
        prompt.encoded.clear()  # workers of another kind are gone before these connect
        hashes = prefix_hash.block_hashes(_cache_root(prompt, kind), prompt.token_ids, kind.block_size)
        encoded = prompt.encoded[kind] = EncodedPrompt(hashes)
    return encoded


def _prompt_sequence(prompt: Prompt, kind: Kind, encoded: EncodedPrompt) -> worker_pb2.Sequence:
    sequence = encoded.sequence
    if not sequence.token_ids:
        sequence.token_ids.extend(prompt.token_ids)
        sequence.prompt_length = len(prompt.token_ids)
        sequence.block_hashes = b"".join(encoded.block_hashes)
        sequence.min_length = prompt.min_length
        sequence.stop_token_ids.extend(sorted(prompt.stop_token_ids))
        sequence.cache_root = _cache_root(prompt, kind)
        sequence.grammar = prompt.grammar
    return sequence


def _cache_root(prompt: Prompt, kind: Kind) -> bytes:
    return prefix_hash.cache_root(kind.fingerprint, prompt.cache_salt)
