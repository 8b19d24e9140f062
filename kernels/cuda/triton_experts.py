# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""A mixture of experts on CUDA; `kernels.experts` holds the references.

Tokens are sorted by expert, so that each expert's are neighbours, and one kernel multiplies all of them: a program has
some rows and some outputs of one expert (a grouped GEMM; "MegaBlocks", Gale et al., 2022). How many rows an
expert has is known on the GPU only. The grid has as many programs as there could ever be work for, and those without
work end at once; so all of it runs in CUDA graphs.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda import triton_fp8_experts
from kernels.cuda.triton_fp8 import quantize
from kernels.cuda.triton_grouped import Choices, Tile, constants, finish, locate, rows_of
from kernels.cuda.triton_launch import dependent, wait_for_previous
from kernels.cuda.triton_norm import rms_norm
from kernels.cuda.triton_tiled_linear import suits_tiles, tiled_linear
from kernels.experts import Experts
from kernels.fp8 import Fp8Weight, Weight
from kernels.hidden import Hidden

_SORT_BLOCK = 8192
_SUM_BLOCK = 1024


@triton.jit
def _choose_kernel(
    scores,
    shares,
    chosen,
    EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One token."""
    token = tl.program_id(0)
    expert = tl.arange(0, BLOCK)
    place = tl.arange(0, PLACES)
    wait_for_previous(DEPENDENT)
    score = tl.load(scores + token * EXPERTS + expert, mask=expert < EXPERTS, other=-float("inf")).to(tl.float32)
    weight = tl.exp(score - tl.max(score))
    total = tl.sum(weight)
    # Of scores that are NaN or infinite, argmax might choose one past the last expert. By `total` their shares are NaN.
    # NaN is told by its bits, since the compiler takes a comparison of what exp returns with 0 for always true.
    is_number = weight.to(tl.int32, bitcast=True) <= 0x7F800000
    weight = tl.where(expert < EXPERTS, tl.where(is_number, weight, 0.0), -1.0)
    share = tl.zeros((PLACES,), tl.float32)
    best = tl.zeros((PLACES,), tl.int32)
    for index in tl.static_range(PER_TOKEN):
        number = tl.argmax(weight, axis=0)
        share = tl.where(place == index, tl.max(weight), share)
        best = tl.where(place == index, number, best)
        weight = tl.where(expert == number, -1.0, weight)
    share /= total
    if NORMALIZED:
        share /= tl.sum(share)
    tl.store(shares + token * PER_TOKEN + place, share, mask=place < PER_TOKEN)
    tl.store(chosen + token * PER_TOKEN + place, best, mask=place < PER_TOKEN)


def choose(scores: Tensor, per_token: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """`kernels.experts.choose` for contiguous CUDA scores [T, E]; the experts are int32."""
    tokens, experts = scores.shape
    shares = torch.empty((tokens, per_token), dtype=torch.float32, device=scores.device)
    chosen = torch.empty((tokens, per_token), dtype=torch.int32, device=scores.device)
    _choose_kernel[(tokens,)](
        scores,
        shares,
        chosen,
        EXPERTS=experts,
        PER_TOKEN=per_token,
        NORMALIZED=normalized,
        BLOCK=triton.next_power_of_2(experts),
        PLACES=triton.next_power_of_2(per_token),
        num_warps=1 if experts <= 256 else 4,
        **dependent(scores.device),
    )
    return shares, chosen


@triton.jit(do_not_specialize=["count"])
def _sort_kernel(chosen, order, starts, count, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """One expert: finds where its rows start, which is how many choices fell on experts before it, and lists them."""
    expert = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    wait_for_previous(DEPENDENT)
    before = tl.zeros((BLOCK,), tl.int32)
    for offset in range(0, count, BLOCK):
        choice = tl.load(chosen + offset + index, mask=offset + index < count, other=expert)
        before += (choice < expert).to(tl.int32)
    start = tl.sum(before)
    tl.store(starts + expert, start)
    for offset in range(0, count, BLOCK):
        mine = (tl.load(chosen + offset + index, mask=offset + index < count, other=-1) == expert).to(tl.int32)
        tl.store(order + start + tl.cumsum(mine) - 1, offset + index, mask=mine > 0)
        start += tl.sum(mine)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts + expert + 1, start)


def sort(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sorts choices by expert; those of one expert keep their order.

    chosen [T, k] int32, contiguous, each less than `experts`. Returns (order [T * k] int32: numbers of choices, starts
    [experts + 1] int32: which part of `order` is an expert's).
    """
    order = torch.empty(chosen.numel(), dtype=torch.int32, device=chosen.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=chosen.device)
    block = min(_SORT_BLOCK, max(triton.next_power_of_2(chosen.numel()), 32))
    _sort_kernel[(experts,)](
        chosen, order, starts, chosen.numel(), BLOCK=block, num_warps=8, **dependent(chosen.device)
    )
    return order, starts


@triton.jit
def _expert_kernel(
    x,
    weight,
    shares,
    order,
    starts,
    out,
    EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GATED: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_M rows and BLOCK_N outputs of one expert.

    If GATED, rows of x are tokens, and those of `out` choices in sorted order. If not, rows of x are choices in sorted
    order, and those of `out` choices in their own order, each times its share.
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
        matrix = weight + expert.to(tl.int64) * (OUTPUTS * INPUTS * (2 if GATED else 1))
        weight_at = matrix + tl.where(output < OUTPUTS, output, 0)[None, :] * INPUTS + column[:, None]

        whole: tl.constexpr = INPUTS % BLOCK_K == 0
        precision: tl.constexpr = "ieee" if EXACT else "tf32"
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_sums = sums
        for offset in tl.range(0, INPUTS, BLOCK_K, num_stages=STAGES):
            exists = column < INPUTS - offset
            here = valid[:, None] if whole else valid[:, None] & exists[None, :]
            value = tl.load(value_at + offset, mask=here, other=0.0)
            gate_at, up_at = weight_at + offset, weight_at + OUTPUTS * INPUTS + offset
            gate = tl.load(gate_at) if whole else tl.load(gate_at, mask=exists[:, None], other=0.0)
            sums = tl.dot(value, gate, sums, input_precision=precision)
            if GATED:
                up = tl.load(up_at) if whole else tl.load(up_at, mask=exists[:, None], other=0.0)
                up_sums = tl.dot(value, up, up_sums, input_precision=precision)
        finish(sums, up_sums, shares, out, row, choice, valid, output, OUTPUTS, GATED)


@triton.jit
def _sum_kernel(
    parts, states, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    wait_for_previous(DEPENDENT)
    total = tl.load(states + token * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    for index in tl.static_range(PER_TOKEN):
        total += tl.load(parts + (token * PER_TOKEN + index) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(states + token * WIDTH + column, total.to(states.dtype.element_ty), mask=inside)


def _tile(choices: int, experts: int, gated: bool, dtype: torch.dtype) -> Tile:
    """Few rows for each expert take as long as reading its weights, and many as long as multiplying. The fastest of
    some that were measured on an H100, with Qwen3-30B-A3B's shapes (docs/kernels.md)."""
    if dtype == torch.float32:
        return Tile(16, 32, 32, 2, 4)
    rows = choices / experts
    if rows <= 24:
        return Tile(16, 32, 128, 4, 4) if gated else Tile(16, 64, 128, 3, 4)
    if rows <= 96:
        return Tile(64, 64 if gated else 128, 64, 4, 4)
    return Tile(128, 128, 64, 4, 8) if gated else Tile(128, 256, 64, 3, 8)


def grouped(x: Tensor, weight: Tensor, choices: Choices, out: Tensor, gated: bool) -> Tensor:
    """The product of one row for each choice with its expert's matrix, as `_expert_kernel` says.

    x, of out's dtype: [T, inputs] if gated, a token's row being that of all its choices, else [T * k, inputs]; weight
    [experts, outputs, inputs], twice as many outputs if gated; out [T * k, outputs], which is written and returned.
    """
    experts, count = weight.shape[0], choices.order.numel()
    tile = _tile(count, experts, gated, x.dtype)
    _expert_kernel[tile.grid(count, experts, out.shape[1])](
        x,
        weight,
        choices.shares,
        choices.order,
        choices.starts,
        out,
        EXACT=x.dtype == torch.float32,
        **constants(tile, choices, weight, out, gated),
    )
    return out


def add_experts(hidden: Hidden, norm: Tensor, eps: float, experts: Experts) -> Hidden:
    """`kernels.experts.add_experts` for contiguous CUDA tensors."""
    states = hidden.states
    if states.shape[0] == 0:
        return hidden
    normed = rms_norm(states, norm, eps)
    if suits_tiles(normed, experts.router):
        scores = tiled_linear(normed, experts.router)
    else:
        scores = F.linear(normed, experts.router)
    shares, chosen = choose(scores, experts.per_token, experts.normalized)
    add_mix(states, normed, shares, chosen, experts)
    return Hidden(states)


def add_mix(states: Tensor, x: Tensor, shares: Tensor, chosen: Tensor, experts: Experts) -> None:
    """Adds `kernels.experts.mix` to states [T, H], in place. x [T, H], of states' dtype; shares [T, k]; chosen [T, k]
    int32."""
    tokens, width = x.shape
    choices = Choices(shares, *sort(chosen, experts.router.shape[0]))
    activated = torch.empty((chosen.numel(), experts.down.shape[2]), dtype=x.dtype, device=x.device)
    parts = torch.empty((chosen.numel(), width), dtype=x.dtype, device=x.device)
    _product(x, experts.gate_up, choices, activated, gated=True)
    _product(activated, experts.down, choices, parts, gated=False)
    _sum_kernel[(tokens, triton.cdiv(width, _SUM_BLOCK))](
        parts,
        states,
        WIDTH=width,
        PER_TOKEN=chosen.shape[1],
        BLOCK=_SUM_BLOCK,
        num_warps=4,
        **dependent(x.device),
    )


def _product(x: Tensor, weight: Weight, choices: Choices, out: Tensor, gated: bool) -> None:
    if isinstance(weight, Fp8Weight):
        triton_fp8_experts.grouped(quantize(x, weight.group), weight, choices, out, gated)
    else:
        grouped(x, weight, choices, out, gated)
