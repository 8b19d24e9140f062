"""What a worker's pool can newly be asked for by hash, and no longer, as messages to routers."""

from collections.abc import Iterator, Mapping

from common.kv.prefix_hash import HASH_BYTES
from twostroke.v1 import worker_pb2 as pb

FIELDS = ("cache", "host_cache")  # of a worker's message: of its pool, and of what it keeps in host memory


def of(message: pb.WorkerMessage) -> Iterator[pb.CacheChanges]:
    """The changes in a message, in the order of `FIELDS`."""
    return (getattr(message, field) for field in FIELDS)


def pack(changes: Mapping[bytes, bool]) -> pb.CacheChanges:
    """`changes`: hashes that can be found now (True), or not any more (False)."""
    return pb.CacheChanges(
        published=b"".join(block_hash for block_hash, found in changes.items() if found),
        dropped=b"".join(block_hash for block_hash, found in changes.items() if not found),
    )


def unpack(hashes: bytes) -> Iterator[bytes]:
    """`hashes`: packed, `HASH_BYTES` each."""
    return (hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES))


def note(changes: dict[bytes, bool], message: pb.CacheChanges) -> None:
    """Puts what a message says, which is no snapshot, on top of earlier `changes`."""
    changes.update(dict.fromkeys(unpack(message.published), True))
    changes.update(dict.fromkeys(unpack(message.dropped), False))
