"""Which files of a Hugging Face directory hold the weights. Imports no torch."""

import json
from collections.abc import Callable
from pathlib import Path

from common.model.model_error import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def files(directory: Path) -> list[Path]:
    """The files that hold a model's weights, in order of their names. Raises ModelError where one is missing."""
    found = [directory / name for name in names(directory, lambda name: (directory / name).exists())]
    for file in found:
        if not file.is_file():
            raise ModelError(f"{file} does not exist; weights must be safetensors")
    return found


def names(directory: Path, has: Callable[[str], bool]) -> list[str]:
    """What the files are called that hold the weights of a model which `has` these and others: model.safetensors, or
    else the shards that the index in `directory` lists. Raises ModelError where that is damaged.

    Both may be there. Where transformers saves a model over a sharded one it leaves the older's index, and when it
    loads, it takes the single file first.
    """
    return _shards(directory) if has(INDEX) and not has(SINGLE) else [SINGLE]


def _shards(directory: Path) -> list[str]:
    index = directory / INDEX
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        inside = all((directory / name).parent == directory for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} is not a valid index of safetensors files") from error
    if not inside:
        raise ModelError(f"{index} names files outside its directory")
    return names
