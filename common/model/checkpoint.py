"""Which files of a Hugging Face directory hold the weights. Imports no torch."""

import json
from pathlib import Path

from common.model.model_config import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def files(directory: Path) -> list[Path]:
    """The files that hold a model's weights, in order of their names: model.safetensors, or else the shards that
    model.safetensors.index.json names. Raises ModelError where one is missing.

    Both may be there. Where transformers saves a model over a sharded one it leaves the older's index, and when it
    loads, it takes the single file first.
    """
    sharded = (directory / INDEX).exists() and not (directory / SINGLE).exists()
    found = [directory / name for name in (shards(directory) if sharded else [SINGLE])]
    for file in found:
        if not file.is_file():
            raise ModelError(f"{file} does not exist; weights must be safetensors")
    return found


def shards(directory: Path) -> list[str]:
    """The names of the files that model.safetensors.index.json lists. Raises ModelError where it is damaged."""
    index = directory / INDEX
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        inside = all((directory / name).parent == directory for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} is not a valid index of safetensors files") from error
    if not inside:
        raise ModelError(f"{index} names files outside its directory")
    return names
