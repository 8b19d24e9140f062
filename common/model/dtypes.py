"""The dtypes that a model can be served in, and its KV kept in."""

import torch

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,  # of KV only
}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of one of these names."""
    return _DTYPES[name]
