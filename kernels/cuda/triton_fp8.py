# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Quantizing to 8-bit floats on CUDA, by itself or with the RMS norm or the gated activation before it; `kernels.fp8`,
`kernels.norm` and `kernels.activation` hold the references and the formulas."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.triton_activation import activated
from kernels.cuda.triton_launch import dependent, let_next_start, wait_for_previous
from kernels.cuda.triton_norm import normalized
from kernels.fp8 import E4M3, LARGEST, SMALLEST

_ALIGNED = 8  # rows: cuBLAS takes no fewer, and TMA needs each group's scales to begin at a multiple of 16 bytes
_PART = 1024  # columns of a program where groups are small


@dataclass(frozen=True, slots=True)
class Quantized:
    """x [T, K] as 8-bit floats times scales. Rows are padded with anything, so that there is a multiple of 8."""

    values: Tensor  # [rows, K] E4M3
    scales: Tensor  # [rows, K / group] float32, with the scales of a group next to each other in memory
    tokens: int  # T
    dtype: torch.dtype  # of x


@triton.jit(do_not_specialize=["pitch"])
def _quantize_kernel(
    x,
    norm,
    values,
    scales,
    x_stride,
    pitch,
    eps,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """PART columns of a row; all of them if NORM, or if one scale holds for all."""
    if EARLY:
        let_next_start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * PART + tl.arange(0, PART)
    inside = column < WIDTH
    if NORM:
        weight = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(DEPENDENT, LET_NEXT_START=not EARLY)
    at = x + row * x_stride + column
    value = tl.load(at, mask=inside, other=0.0)
    if GATED:
        value = activated(value, tl.load(at + WIDTH, mask=inside, other=0.0))
    if NORM:
        value = normalized(value.to(tl.float32), weight, eps, WIDTH, value.dtype)
    size: tl.constexpr = GROUP if GROUP < WIDTH else PART
    groups = tl.reshape(value.to(tl.float32), (PART // size, size))
    scale = tl.maximum(tl.max(tl.abs(groups), axis=1), SMALLEST) / LARGEST
    quantized = tl.reshape(groups / scale[:, None], (PART,)).to(tl.float8e4nv)
    tl.store(values + row * WIDTH + column, quantized, mask=inside)
    group = tl.program_id(1) * (PART // size) + tl.arange(0, PART // size)
    tl.store(scales + group * pitch + row, scale, mask=group < WIDTH // GROUP)


def quantize(
    x: Tensor, group: int, norm: Tensor | None = None, eps: float = 0.0, *, gated: bool = False, early: bool = False
) -> Quantized:
    """`kernels.fp8.quantize` of x, or of rms_norm(x, norm, eps), for a CUDA tensor [T, K] whose last dimension is
    contiguous.

    gated: of silu_mul(x), for x [T, 2 K].
    early: the next kernel may start at once, since it has much to load before it waits (`kernels.cuda.triton_launch`).
    """
    tokens, width = x.shape[0], x.shape[1] // (2 if gated else 1)
    rows = triton.cdiv(tokens, _ALIGNED) * _ALIGNED
    values = torch.empty((rows, width), dtype=E4M3, device=x.device)
    scales = torch.empty((width // group, rows), dtype=torch.float32, device=x.device)
    whole = triton.next_power_of_2(width)
    part = min(_PART, whole) if group < width and norm is None else whole
    if tokens:
        _quantize_kernel[(tokens, triton.cdiv(width, part))](
            x,
            x if norm is None else norm,
            values,
            scales,
            x.stride(0),
            rows,
            eps,
            WIDTH=width,
            GROUP=group,
            PART=part,
            LARGEST=LARGEST,
            SMALLEST=SMALLEST,
            NORM=norm is not None,
            GATED=gated,
            EARLY=early,
            num_warps=min(max(part // 256, 1), 16),
            **dependent(x.device),
        )
    return Quantized(values, scales.t(), tokens, x.dtype)
