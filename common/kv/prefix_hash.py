"""Chained 128-bit hashes of full blocks: equal hashes mean equal tokens from the start, on one model, for one tenant.

BLAKE2b with a 16-byte digest (RFC 7693). Each block's hash covers the one before it, so a single look-up vouches for
the whole prefix. Only among about 2^64 blocks is there an even chance that two different ones share a hash.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16  # of a block's hash, and of the root


def cache_root(fingerprint: str, cache_salt: str) -> bytes:
    """Where a chain starts: 16 bytes that depend on the model's fingerprint and the request's cache salt.

    Sequences with different roots never share blocks.
    """
    model, salt = fingerprint.encode(), cache_salt.encode()
    return blake2b(struct.pack("<Q", len(model)) + model + salt, digest_size=HASH_BYTES).digest()


def extend(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The 16-byte hash of one full block of `tokens` (each below 2^32) that follows `parent` (a hash, or the root)."""
    return blake2b(parent + struct.pack(f"<{len(tokens)}I", *tokens), digest_size=HASH_BYTES).digest()


def block_hashes(root: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """The hashes of the full blocks of `tokens`, in order; a partly filled last block has none.

    O(len(tokens)); equal to calling `extend` block by block, and about half its cost.
    """
    full_blocks = len(tokens) // block_size
    full_tokens = full_blocks * block_size
    packed = struct.pack(f"<{full_tokens}I", *tokens[:full_tokens])
    block_bytes = 4 * block_size
    hashes: list[bytes] = []
    parent = root
    for start in range(0, len(packed), block_bytes):
        parent = blake2b(parent + packed[start : start + block_bytes], digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes
