"""Linear layers on CUDA, each by the fastest of five ways for its shape: `triton_few_rows`, `streamed_linear`,
`gated_linear`, `triton_tiled_linear`, or cuBLAS with norm and activation as kernels of their own. `kernels.linear`
holds the references. Weights of 8-bit floats are for `fp8_linear`."""

import torch.nn.functional as F
from torch import Tensor

from kernels.cuda import fp8_linear, streamed_linear, triton_few_rows
from kernels.cuda.gated_linear import gated_linear, suits_gated
from kernels.cuda.gpu import is_hopper
from kernels.cuda.triton_activation import silu_mul
from kernels.cuda.triton_few_rows import few_rows_linear
from kernels.cuda.triton_norm import rms_norm
from kernels.cuda.triton_tiled_linear import suits_tiles, tiled_linear
from kernels.fp8 import Fp8Weight, Weight
from kernels.hidden import Hidden
from kernels.linear import Mlp

# The first of these that applies. Measured on an H100, those for more than 64 rows and the use of SMs on an H200
# (docs/kernels.md).
# 1. few rows: up to _FEW_ROWS with a small weight, and what else it supports if nothing is streamed.
# 2. streamed: up to _STREAMED_ROWS. Above that with at least _STREAMED_INPUTS inputs, if the layer before has begun the
#    norm or this one begins the next; or with a large weight, up to _STREAMED_AFTER_NORM rows or as many as it supports
#    if it adds to the residual, in at most _STREAMED_SPLITS parts, and, not split, if it uses _STREAMED_USE of the SMs.
# 3. gated, for gate and up with a large weight: up to _GATED_ROWS, and from _GATED_PAIRS_ROWS on. In between, its pairs
#    of thread blocks multiply too much that is not there.
# 4. tiles, with a small weight.
# 5. cuBLAS.
_SMALL_WEIGHT = 1 << 23  # elements
_FEW_ROWS = 2
_STREAMED_ROWS = 32
_STREAMED_INPUTS = 640
_STREAMED_AFTER_NORM = 64
_STREAMED_SPLITS = 2
_STREAMED_USE = 0.7
_GATED_ROWS = 128
_GATED_PAIRS_ROWS = 176


def _is_small(weight: Tensor) -> bool:
    return weight.numel() <= _SMALL_WEIGHT


def _few(x: Tensor, weight: Tensor, *, gated: bool = False) -> bool:
    rows = x.shape[0]
    best, most = (_FEW_ROWS, triton_few_rows.MAX_ROWS) if _is_small(weight) else (0, 1)
    return 0 < rows <= best or (0 < rows <= most and not streams(x, weight, gated=gated))


def streams(
    x: Tensor,
    weight: Tensor,
    *,
    gated: bool = False,
    begun: bool = False,
    adds: bool = False,
    begins: Tensor | None = None,
) -> bool:
    """Whether `streamed_linear` takes this product.

    Args:
        begun: the layer before has begun the norm of this one.
        adds: to the residual.
        begins: the weight of the next layer's norm, which this one may begin.
    """
    if not (is_hopper(x.device) and streamed_linear.suits_stream(x, weight, gated=gated)):
        return False
    if x.shape[0] <= _STREAMED_ROWS:
        return True
    if weight.shape[1] < _STREAMED_INPUTS:
        return False
    if begun or streamed_linear.begins_norm(x, weight, begins):
        return True
    if _is_small(weight) or not (adds or x.shape[0] <= _STREAMED_AFTER_NORM):
        return False
    splits = streamed_linear.splits(x, weight)
    return splits <= _STREAMED_SPLITS and (splits > 1 or streamed_linear.used(x, weight) >= _STREAMED_USE)


def _gates(x: Tensor, gate_up: Tensor) -> bool:
    suits = is_hopper(x.device) and not _is_small(gate_up) and suits_gated(x, gate_up)
    return suits and not _GATED_ROWS < x.shape[0] < _GATED_PAIRS_ROWS


def _tiles(x: Tensor, weight: Tensor) -> bool:
    return _is_small(weight) and suits_tiles(x, weight)


def norm_linear(hidden: Hidden, norm: Tensor, eps: float, weight: Weight, bias: Tensor | None) -> Tensor:
    """`kernels.linear.norm_linear` for CUDA tensors whose last dimensions are contiguous."""
    if isinstance(weight, Fp8Weight):
        return fp8_linear.norm_linear(hidden, norm, eps, weight, bias)
    x = hidden.states
    if _few(x, weight):
        return few_rows_linear(x, weight, norm=norm, eps=eps, bias=bias)
    if streams(x, weight, begun=hidden.begun is not None):
        return _normed_stream(hidden, norm, eps, weight, bias=bias)
    normed = rms_norm(x, norm, eps)
    if _tiles(normed, weight):
        return tiled_linear(normed, weight, bias=bias)
    return F.linear(normed, weight, bias)


def norm_gated_linear(hidden: Hidden, norm: Tensor, eps: float, gate_up: Tensor) -> Tensor:
    """`kernels.linear.norm_gated_linear` for CUDA tensors whose last dimensions are contiguous."""
    x = hidden.states
    if _few(x, gate_up, gated=True):
        return few_rows_linear(x, gate_up, norm=norm, eps=eps, gated=True)
    if streams(x, gate_up, gated=True, begun=hidden.begun is not None):
        return _normed_stream(hidden, norm, eps, gate_up, gated=True)
    gates = _gates(x, gate_up)
    normed = rms_norm(x, norm, eps, early=gates)
    if gates:
        return gated_linear(normed, gate_up)
    if _tiles(normed, gate_up):
        return tiled_linear(normed, gate_up, gated=True)
    return silu_mul(F.linear(normed, gate_up))


def add_linear(hidden: Hidden, x: Tensor, weight: Weight, bias: Tensor | None, next_norm: Tensor | None) -> Hidden:
    """`kernels.linear.add_linear` for CUDA tensors whose last dimensions are contiguous."""
    if isinstance(weight, Fp8Weight):
        return fp8_linear.add_linear(hidden, x, weight, bias)
    states = hidden.states
    if _few(x, weight):
        return Hidden(few_rows_linear(x, weight, bias=bias, residual=states))
    if streams(x, weight, adds=True, begins=next_norm):
        return streamed_linear.add_streamed_linear(states, x, weight, bias, next_norm)
    if _tiles(x, weight):
        return Hidden(tiled_linear(x, weight, bias=bias, residual=states))
    states.addmm_(x, weight.t())
    if bias is not None:
        states.add_(bias)
    return Hidden(states)


def add_mlp(hidden: Hidden, norm: Tensor, eps: float, mlp: Mlp, next_norm: Tensor | None) -> Hidden:
    """`kernels.linear.add_mlp` for CUDA tensors whose last dimensions are contiguous."""
    gate_up, down = mlp.gate_up, mlp.down
    if isinstance(gate_up, Fp8Weight):
        assert isinstance(down, Fp8Weight)
        return fp8_linear.add_mlp(hidden, norm, eps, gate_up, down)
    return add_linear(hidden, norm_gated_linear(hidden, norm, eps, gate_up), down, None, next_norm)


def _normed_stream(
    hidden: Hidden, norm: Tensor, eps: float, weight: Tensor, *, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    if (begun := hidden.begun) is not None:
        return streamed_linear.streamed_linear(begun.x, weight, squares=begun.squares, eps=eps, bias=bias, gated=gated)
    return streamed_linear.streamed_linear(
        rms_norm(hidden.states, norm, eps, early=True), weight, bias=bias, gated=gated
    )
