"""A request as workers are told of it: its tokens so far, and the hashes of their blocks.

What there is of the prompt alone is made once for all choices of a call.
"""

from common import prefix_hash
from router.request import Prompt, Request
from twostroke.v1 import worker_pb2


def hash_blocks(request: Request, hello: worker_pb2.WorkerHello) -> None:
    """Hashes the blocks that were not hashed before: all at first, then those with the tokens of the last attempt."""
    block_size = hello.pool.layout.block_size
    if not request.block_hashes:
        request.block_hashes = _prompt_hashes(request.prompt, hello)
    hashes, prompt = request.block_hashes, request.prompt.token_ids
    if len(hashes) < request.length // block_size:
        parent = hashes[-1] if hashes else _cache_root(request.prompt, hello)
        start = len(hashes) * block_size
        tokens = (*prompt[start:], *request.output[max(start - len(prompt), 0) :])
        # a new list: the one before may be the prompt's
        request.block_hashes = hashes + prefix_hash.block_hashes(parent, tokens, block_size)


def sequence_of(request: Request, hello: worker_pb2.WorkerHello) -> worker_pb2.Sequence:
    prompt = request.prompt
    sequence = worker_pb2.Sequence()
    sequence.CopyFrom(_packed(prompt, hello))
    sequence.token_ids.extend(request.output)
    if request.block_hashes is not prompt.block_hashes:
        sequence.block_hashes = b"".join(request.block_hashes)
    sequence.sampling.CopyFrom(request.sampling)
    sequence.request_id = request.id
    return sequence


def _prompt_hashes(prompt: Prompt, hello: worker_pb2.WorkerHello) -> list[bytes]:
    if not prompt.block_hashes:
        root, block_size = _cache_root(prompt, hello), hello.pool.layout.block_size
        prompt.block_hashes.extend(prefix_hash.block_hashes(root, prompt.token_ids, block_size))
    return prompt.block_hashes


def _packed(prompt: Prompt, hello: worker_pb2.WorkerHello) -> worker_pb2.Sequence:
    if not prompt.packed.token_ids:
        prompt.packed.token_ids.extend(prompt.token_ids)
        prompt.packed.prompt_length = len(prompt.token_ids)
        prompt.packed.block_hashes = b"".join(_prompt_hashes(prompt, hello))
        prompt.packed.max_length = prompt.max_length
        prompt.packed.min_length = prompt.min_length
        prompt.packed.stop_token_ids.extend(sorted(prompt.stop_token_ids))
        prompt.packed.cache_root = _cache_root(prompt, hello)
    return prompt.packed


def _cache_root(prompt: Prompt, hello: worker_pb2.WorkerHello) -> bytes:
    return prefix_hash.cache_root(hello.fingerprint, prompt.cache_salt)
