"""Safetensors files, mapped into memory."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.model.model_error import ModelError

HEADER_LENGTH = struct.Struct("<Q")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}


def read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """({name: {"dtype", "shape", "data_offsets"}}, byte at which the data starts). Raises ModelError for a damaged
    file."""
    try:
        # the library checks the whole header, also against the file's size
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable safetensors file: {error}") from error
    with file.open("rb") as stream:
        (length,) = HEADER_LENGTH.unpack(stream.read(HEADER_LENGTH.size))
        header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, HEADER_LENGTH.size + length


def map_tensors(file: Path) -> dict[str, Tensor]:
    """The file's tensors by name, as views of one private mapping that is read from disk as it is used.

    (safe_open would give each a storage of its own, and neighbours could not be joined without a copy.)

    Raises:
        ModelError: the file is damaged, or a dtype is not supported.
    """
    header, data_start = read_header(file)
    mapping = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    tensors = {}
    for name, entry in header.items():
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ModelError(
                f"{name} in {file} is {entry['dtype']}, which is not supported; supported are {', '.join(DTYPES)}"
            )
        start, end = (data_start + offset for offset in entry["data_offsets"])
        stored = mapping[start:end]
        if start % dtype.itemsize:
            stored = stored.clone()
        tensors[name] = stored.view(dtype).view(entry["shape"])
    return tensors
