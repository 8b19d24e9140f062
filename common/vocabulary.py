"""Which token each id stands for: what a router and its workers must agree on, or tokens are nonsense to one."""

import hashlib
import json
from pathlib import Path

from common.model_config import ModelError, read_json


def digest(directory: Path) -> str:
    """32 hex digits (128 bits) of blake2b over the tokens of tokenizer.json by their ids, added ones among them; empty
    where the directory has none, as a worker's may.

    Not over the file: libraries write the same tokenizer in many ways, and how text is cut concerns the router alone.
    Raises ModelError.
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
