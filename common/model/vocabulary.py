"""Which token each id stands for. A router and its workers must agree on that."""

import hashlib
import json
from pathlib import Path

from common.model.model_config import read_json
from common.model.model_error import ModelError


def digest(directory: Path) -> str:
    """32 hex digits (128 bits) of BLAKE2b over the ids and tokens of tokenizer.json, added ones included. Empty if the
    directory has no such file, as a worker's may not.

    It does not cover the whole file: libraries write the same tokenizer in many ways, and how text is split into tokens
    concerns only the router.

    Raises:
        ModelError: the file cannot be read, or holds no vocabulary.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        return ""
    raw = read_json(file)
    try:
        named = raw["model"]["vocab"]
        if not isinstance(named, dict):  # a list of pieces and their scores
            named = {piece: place for place, (piece, _) in enumerate(named)}
        tokens = {(int(place), str(piece)) for piece, place in named.items()}
        tokens |= {(int(added["id"]), str(added["content"])) for added in raw.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{file} holds no vocabulary: {error!r}") from error
    return hashlib.blake2b(json.dumps(sorted(tokens)).encode(), digest_size=16).hexdigest()
