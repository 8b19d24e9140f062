"""The dtypes that a model can be served in."""

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype called "float32", "bfloat16" or "float16"."""
    return _DTYPES[name]
