# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The gated activation on CUDA; `kernels.activation` holds the reference."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.triton_launch import dependent, wait_for_previous

_BLOCK = 1024


@triton.jit
def activated(gate, up):
    """SiLU(gate) * up, of one dtype. Rounded as the reference rounds."""
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    return (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _silu_mul_kernel(gate_up, out, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    wait_for_previous(DEPENDENT)
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * stride + WIDTH + column, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + column, activated(gate, up), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`kernels.activation.silu_mul` for a CUDA tensor [T, 2I] whose last dimension is contiguous."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        grid = (rows, triton.cdiv(width, _BLOCK))
        _silu_mul_kernel[grid](
            gate_up, out, gate_up.stride(0), WIDTH=width, BLOCK=_BLOCK, num_warps=4, **dependent(gate_up.device)
        )
    return out
