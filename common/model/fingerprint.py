"""What tells models apart: workers exchange KV, and share its hashes, only if their fingerprints are equal."""

import hashlib
import json
import os
from pathlib import Path

from common.kv.kv_pool import KvLayout
from common.model import checkpoint
from common.model.safetensors_files import read_header

_SAMPLE_BYTES = 1024


def compute(directory: Path, load_format: str, dtype: str, layout: KvLayout) -> str:
    """32 hex digits (128 bits) of BLAKE2b over config.json, the dtype served, the shape of a KV block, and the weights.

    Of the weights it reads each file's safetensors header (names, dtypes, shapes, offsets) and 1 KiB from the middle of
    each tensor: enough to tell apart models that were trained differently, and 16 GB take milliseconds. With
    load_format "dummy" there are no weights to read. The number of blocks is left out, because workers of one cluster
    may have pools of different sizes.

    Raises:
        ModelError: a file of weights is missing or damaged.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(json.loads((directory / "config.json").read_bytes()), sort_keys=True).encode())
    block = (layout.dtype, layout.num_layers, layout.block_size, layout.num_kv_heads, layout.head_dim)
    digest.update(repr((load_format, dtype, block)).encode())
    if load_format != "dummy":
        for file in checkpoint.files(directory):
            _add_weights(digest, file)
    return digest.hexdigest()


def _add_weights(digest: "hashlib.blake2b", file: Path) -> None:
    header, data_start = read_header(file)
    digest.update(json.dumps(header, sort_keys=True).encode())
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for _, tensor in sorted(header.items()):
            start, end = tensor["data_offsets"]
            middle = (start + end) // 2
            digest.update(os.pread(descriptor, min(_SAMPLE_BYTES, end - middle), data_start + middle))
    finally:
        os.close(descriptor)
