"""A request as workers are told of it: its tokens so far, and the hashes of their blocks."""

from common import prefix_hash
from router.request import Request
from twostroke.v1 import worker_pb2


def hash_blocks(request: Request, hello: worker_pb2.WorkerHello) -> None:
    """Hashes the blocks that were not hashed before: all at first, then those with the tokens of the last attempt."""
    block_size = hello.pool.layout.block_size
    hashes = request.block_hashes
    if len(hashes) < request.length // block_size:
        tokens = (*request.prompt.token_ids, *request.output)
        parent = hashes[-1] if hashes else _cache_root(request, hello)
        hashes += prefix_hash.block_hashes(parent, tokens[len(hashes) * block_size :], block_size)


def _cache_root(request: Request, hello: worker_pb2.WorkerHello) -> bytes:
    return prefix_hash.cache_root(hello.fingerprint, request.prompt.cache_salt)


def sequence_of(request: Request, hello: worker_pb2.WorkerHello) -> worker_pb2.Sequence:
    return worker_pb2.Sequence(
        token_ids=(*request.prompt.token_ids, *request.output),
        prompt_length=len(request.prompt.token_ids),
        block_hashes=b"".join(request.block_hashes),
        sampling=request.sampling,
        max_length=request.prompt.max_length,
        min_length=request.prompt.min_length,
        stop_token_ids=sorted(request.prompt.stop_token_ids),
        cache_root=_cache_root(request, hello),
        request_id=request.id,
    )
