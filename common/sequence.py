"""A sequence as a router asks a worker to run it."""

from dataclasses import dataclass, field

from common.kv import cache_changes
from common.kv.prefix_hash import HASH_BYTES
from common.sampling.parameters import SamplingParams, sampling_from_proto
from twostroke.v1 import worker_pb2 as pb


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """A prompt, and the tokens generated so far where an earlier attempt was cut short.

    The random number for a token is keyed by (sampling.seed, the token's index in the whole sequence), so a resumed
    sequence goes on as it would have.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    block_hashes: tuple[bytes, ...]  # one for each full block of token_ids
    sampling: SamplingParams
    max_length: int  # tokens of the whole sequence, at which it ends
    min_length: int = 0  # tokens of the whole sequence, below which stop_token_ids are not sampled
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    cache_root: bytes = b""  # what the chain of block hashes starts from
    request_id: str = ""  # the client's, for logs
    grammar: str = ""  # that the output follows; see common/sampling/grammar.py

    @property
    def output(self) -> tuple[int, ...]:
        """The tokens that earlier attempts generated."""
        return self.token_ids[self.prompt_length :]

    def blocks_before_last_token(self, block_size: int) -> int:
        """How many blocks a prefill can skip if they are cached. The last token is always computed, because its logits
        give the next one."""
        return (len(self.token_ids) - 1) // block_size

    def hashes_before_last_token(self, block_size: int) -> tuple[bytes, ...]:
        return self.block_hashes[: self.blocks_before_last_token(block_size)]

    def ends_with(self, token: int, length: int) -> bool:
        """Whether `token` is the last one of the sequence, which has `length` tokens with it."""
        return token in self.stop_token_ids or length >= self.max_length


def sequence_from_proto(message: pb.Sequence) -> SequenceSpec:
    """Raises ValueError, with a sentence, if the message contradicts itself."""
    hashes = message.block_hashes
    if len(hashes) % HASH_BYTES:
        raise ValueError(f"block_hashes has {len(hashes)} bytes, which is no multiple of {HASH_BYTES}")
    if not 0 < message.prompt_length <= len(message.token_ids):
        raise ValueError(f"prompt_length is {message.prompt_length}, but there are {len(message.token_ids)} token_ids")
    if message.max_length <= len(message.token_ids):
        raise ValueError(
            f"max_length is {message.max_length}, but there are {len(message.token_ids)} token_ids already"
        )
    if message.min_length > message.max_length:
        raise ValueError(f"min_length is {message.min_length}, and max_length {message.max_length}")
    if not message.request_id.isprintable():
        raise ValueError("request_id is not printable")
    return SequenceSpec(
        token_ids=tuple(message.token_ids),
        prompt_length=message.prompt_length,
        block_hashes=tuple(cache_changes.unpack(hashes)),
        sampling=sampling_from_proto(message.sampling),
        max_length=message.max_length,
        min_length=message.min_length,
        stop_token_ids=frozenset(message.stop_token_ids),
        cache_root=message.cache_root,
        request_id=message.request_id,
        grammar=message.grammar,
    )
