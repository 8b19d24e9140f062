"""The table of operations that a model runs on, filled once for a device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
import torch
from torch import Tensor

from kernels import attention, drafts, experts, linear, rope, sampling, step
from kernels.attention import DecodeAttention, PrefillAttention
from kernels.drafts import DraftedRows
from kernels.experts import Experts
from kernels.fp8 import Weight
from kernels.hidden import Hidden
from kernels.linear import Mlp
from kernels.rope import Rotation
from kernels.sampling import SamplingRows

Sample = Callable[[Tensor, SamplingRows, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one layer, laid out as F.linear takes them: [out, in]. H: hidden size; Hq, Hkv: query and KV heads;
    D: head_dim."""

    attention_norm: Tensor  # [H]
    qkv: Weight  # [(Hq + 2 Hkv) * D, H]: q, k, v
    qkv_bias: Tensor | None  # [(Hq + 2 Hkv) * D]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    output: Weight  # [H, Hq * D]
    output_bias: Tensor | None  # [H]
    mlp_norm: Tensor  # [H]
    mlp: Mlp | Experts


class FusedLayers(Protocol):
    """All layers of a decode step of one sequence, as one operation; equal to each layer's operations one by one."""

    def __call__(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, seq_lens: Tensor, block_tables: Tensor
    ) -> Tensor:
        """tokens, positions [1] int32: the token and its position. slots [1] int64: where its K and V go (-1: nowhere).
        seq_lens [1] int32: the sequence's length, this token included. block_tables [1, B] int32. Returns the hidden
        state after the last layer [1, H], before the final norm."""


@dataclass(frozen=True, slots=True)
class Ops:
    """One function per operation, with the same signature and meaning on every device. The torch references say
    what each does."""

    norm_linear: Callable[[Hidden, Tensor, float, Weight, Tensor | None], Tensor]
    add_linear: Callable[[Hidden, Tensor, Weight, Tensor | None, Tensor | None], Hidden]
    add_mlp: Callable[[Hidden, Tensor, float, Mlp, Tensor | None], Hidden]
    add_experts: Callable[[Hidden, Tensor, float, Experts], Hidden]
    rope_write_kv: Callable[[Tensor, Rotation, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    prefill_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, PrefillAttention, float], Tensor]
    plan_decode: Callable[[Tensor, Tensor, Tensor], DecodeAttention]
    decode_attention: Callable[[Tensor, Rotation, Tensor, Tensor, DecodeAttention, float], Tensor]
    sample: Sample
    locate: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    advance: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    draft: Callable[[Tensor, Tensor, Tensor, Tensor, int, int], DraftedRows]
    accept: Callable[[Tensor, Tensor, Tensor, DraftedRows, Tensor, int], Tensor]
    fuse_layers: Callable[[Sequence[LayerWeights], Tensor, Tensor, float, Tensor], FusedLayers | None]


def fuse_layers(
    layers: Sequence[LayerWeights], embedding: Tensor, cos_sin: Tensor, eps: float, pool: Tensor
) -> FusedLayers | None:
    """All layers as one operation, or None if these cannot be fused on this device: then run the operations one by one.
    This reference fuses none.

    embedding [V, H]; cos_sin [max_position, D] float32; pool [blocks, layers, 2, block_size, Hkv, D], maybe of 8-bit
    floats; all else of one dtype. The result keeps a reference to each tensor and uses it in place.
    """
    return None


REFERENCE = Ops(
    norm_linear=linear.norm_linear,
    add_linear=linear.add_linear,
    add_mlp=linear.add_mlp,
    add_experts=experts.add_experts,
    rope_write_kv=rope.rope_write_kv,
    prefill_attention=attention.prefill_attention,
    plan_decode=attention.plan_decode,
    decode_attention=attention.decode_attention,
    sample=sampling.sample,
    locate=step.locate,
    advance=step.advance,
    draft=drafts.draft,
    accept=drafts.accept,
    fuse_layers=fuse_layers,
)


def select(device: torch.device) -> Ops:
    """The fastest functions for `device`: the references on a CPU; Triton, CUDA C++ and FlashAttention-3 on CUDA."""
    ops = REFERENCE if device.type == "cpu" else _cuda(device)
    structlog.get_logger().info(
        "kernels chosen", **{name: getattr(ops, name).__module__ for name in Ops.__dataclass_fields__}
    )
    return ops


def _cuda(device: torch.device) -> Ops:
    # imported here: machines without a GPU do not have these packages
    from kernels.cuda import (
        fastest_linear,
        flash_attention_3,
        persistent_layers,
        triton_decode_attention,
        triton_drafts,
        triton_experts,
        triton_prefill_attention,
        triton_rope,
        triton_sampling,
        triton_step,
    )

    return Ops(
        norm_linear=fastest_linear.norm_linear,
        add_linear=fastest_linear.add_linear,
        add_mlp=fastest_linear.add_mlp,
        add_experts=triton_experts.add_experts,
        rope_write_kv=triton_rope.rope_write_kv,
        prefill_attention=(
            flash_attention_3 if flash_attention_3.usable(device) else triton_prefill_attention
        ).prefill_attention,
        plan_decode=triton_decode_attention.plan_decode,
        decode_attention=triton_decode_attention.decode_attention,
        sample=triton_sampling.sample,
        locate=triton_step.locate,
        advance=triton_step.advance,
        draft=triton_drafts.draft,
        accept=triton_drafts.accept,
        fuse_layers=persistent_layers.fuse_layers,
    )
