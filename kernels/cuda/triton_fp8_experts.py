# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Grouped products with experts of 8-bit floats on CUDA; `kernels.fp8` says what their scales are."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.triton_fp8 import Quantized
from kernels.cuda.triton_grouped import Choices, Tile, constants, finish, locate, rows_of
from kernels.cuda.triton_launch import wait_for_previous
from kernels.fp8 import GROUP, Fp8Weight


@triton.jit(do_not_specialize=["pitch"])
def _fp8_expert_kernel(
    x,
    x_scales,
    weight,
    weight_scales,
    shares,
    order,
    starts,
    out,
    pitch,
    EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_M rows and BLOCK_N outputs of one expert; rows are those of `_expert_kernel`.

    GROUP: inputs, and outputs, that share a scale; a step's inputs then are a group, and a program's outputs a part of
    one. 0: one scale for all inputs of an output. `pitch` is the distance of a group's scales of x from the next one's.
    """
    wait_for_previous(DEPENDENT)
    expert, place = locate(starts, EXPERTS, BLOCK_E, BLOCK_M)
    if expert < EXPERTS:
        row, valid, choice = rows_of(starts, order, expert, place, BLOCK_M)
        output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tl.arange(0, BLOCK_K)
        source = choice // PER_TOKEN if GATED else row
        value_at = x + source.to(tl.int64)[:, None] * INPUTS + column[None, :]
        # beyond the last output, the first is read again and not stored
        known = tl.where(output < OUTPUTS, output, 0)
        matrices: tl.constexpr = 2 if GATED else 1
        gate_at = (
            weight + expert.to(tl.int64) * (OUTPUTS * INPUTS * matrices) + known[None, :] * INPUTS + column[:, None]
        )
        up_at = gate_at + OUTPUTS * INPUTS
        if GROUP > 0:
            groups: tl.constexpr = INPUTS // GROUP
            scale_rows: tl.constexpr = OUTPUTS // GROUP
            first_row = expert * (scale_rows * matrices) + tl.program_id(0) * BLOCK_N // GROUP
            gate_scale_at = weight_scales + first_row * groups
            up_scale_at = gate_scale_at + scale_rows * groups
        else:
            gate_scale_at = weight_scales + expert * (OUTPUTS * matrices) + known
            up_scale_at = gate_scale_at + OUTPUTS

        whole: tl.constexpr = INPUTS % BLOCK_K == 0
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_sums = sums
        for offset in tl.range(0, INPUTS, BLOCK_K, num_stages=STAGES):
            exists = column < INPUTS - offset
            here = valid[:, None] if whole else valid[:, None] & exists[None, :]
            value = tl.load(value_at + offset, mask=here, other=0.0)
            gate = tl.load(gate_at + offset) if whole else tl.load(gate_at + offset, mask=exists[:, None], other=0.0)
            # tensor cores add products of 8-bit floats up with fewer bits than float32 has, so each step's sum is new
            product = tl.dot(value, gate)
            if GROUP > 0:
                group = offset // GROUP
                x_scale = tl.load(x_scales + group * pitch + source, mask=valid, other=0.0)
                product *= (x_scale * tl.load(gate_scale_at + group))[:, None]
            sums += product
            if GATED:
                up = tl.load(up_at + offset) if whole else tl.load(up_at + offset, mask=exists[:, None], other=0.0)
                product = tl.dot(value, up)
                if GROUP > 0:
                    product *= (x_scale * tl.load(up_scale_at + group))[:, None]
                up_sums += product
        if GROUP == 0:
            x_scale = tl.load(x_scales + source, mask=valid, other=0.0)[:, None]
            sums *= x_scale * tl.load(gate_scale_at)[None, :]
            if GATED:
                up_sums *= x_scale * tl.load(up_scale_at)[None, :]
        finish(sums, up_sums, shares, out, row, choice, valid, output, OUTPUTS, GATED)


def _tile(choices: int, experts: int, gated: bool) -> Tile:
    """Few rows for each expert take as long as reading its weights, and many as long as multiplying. The fastest of
    some that were measured on an H100, with Qwen3-30B-A3B's shapes (docs/kernels.md)."""
    rows = choices / experts
    if rows <= 24:
        return Tile(16, 32 if gated else 64, 128, 5, 4)
    if rows <= 96:
        return Tile(64, 64 if gated else 128, 128, 4, 4)
    return Tile(128, 64, 128, 3, 4) if gated else Tile(64, 128, 128, 4, 4)


def grouped(x: Quantized, weight: Fp8Weight, choices: Choices, out: Tensor, gated: bool) -> Tensor:
    """`kernels.cuda.triton_experts.grouped` of 8-bit floats."""
    experts, count = weight.shape[0], choices.order.numel()
    tile = _tile(count, experts, gated)
    assert not weight.in_blocks or (tile.inputs == GROUP and GROUP % tile.outputs == 0)
    _fp8_expert_kernel[tile.grid(count, experts, out.shape[1])](
        x.values,
        x.scales,
        weight.values,
        weight.scales,
        choices.shares,
        choices.order,
        choices.starts,
        out,
        x.scales.stride(1),
        GROUP=GROUP if weight.in_blocks else 0,
        **constants(tile, choices, weight.values, out, gated),
    )
    return out
