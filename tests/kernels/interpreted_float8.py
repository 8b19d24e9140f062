"""Triton's interpreter (3.6) converts to and from 8-bit floats wrongly: what rounds up to the next power of two becomes
half of that, and NaN becomes a number. `mend` has torch convert them instead, as a GPU does."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from kernels.fp8 import E4M3, LARGEST

_TORCH = {tl.float32: torch.float32, tl.float16: torch.float16, tl.float8e4nv: E4M3}
_original = interpreter._convert_float


def mend() -> None:
    interpreter._convert_float = _convert


def _convert(bits: "np.ndarray[Any, Any]", source: tl.dtype, target: tl.dtype, rounding: object) -> object:
    """Arrays hold the bits of floats, as unsigned integers or, of what numpy knows, as floats."""
    if tl.float8e4nv not in (source, target) or not {source, target} <= set(_TORCH):
        return _original(bits, source, target, rounding)
    value = torch.from_numpy(np.ascontiguousarray(bits)).view(_TORCH[source]).float()
    if target == tl.float8e4nv:
        value = value.clamp(-LARGEST, LARGEST)  # as cvt.satfinite; NaN stays
    return _bits(value.to(_TORCH[target]))


def _bits(value: Tensor) -> object:
    return value.view(torch.uint8).numpy() if value.dtype == E4M3 else value.numpy()
