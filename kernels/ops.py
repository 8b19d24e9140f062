"""The table of operations a model runs on, chosen once for a device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog
import torch
from torch import Tensor

from kernels import attention, linear, rope, sampling, step
from kernels.attention import DecodeAttention, PrefillAttention
from kernels.rope import Rotation


class Sample(Protocol):
    def __call__(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Ops:
    """Functions of one meaning and signature on every device; their references say what they do."""

    norm_linear: Callable[[Tensor, Tensor, float, Tensor, Tensor | None], Tensor]
    norm_gated_linear: Callable[[Tensor, Tensor, float, Tensor], Tensor]
    add_linear: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    rope_write_kv: Callable[[Tensor, Rotation, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    prefill_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, PrefillAttention, float], Tensor]
    plan_decode: Callable[[Tensor, Tensor, Tensor], DecodeAttention]
    decode_attention: Callable[[Tensor, Rotation, Tensor, Tensor, DecodeAttention, float], Tensor]
    sample: Sample
    locate: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    advance: Callable[[Tensor, Tensor, Tensor], None]


REFERENCE = Ops(
    norm_linear=linear.norm_linear,
    norm_gated_linear=linear.norm_gated_linear,
    add_linear=linear.add_linear,
    rope_write_kv=rope.rope_write_kv,
    prefill_attention=attention.prefill_attention,
    plan_decode=attention.plan_decode,
    decode_attention=attention.decode_attention,
    sample=sampling.sample,
    locate=step.locate,
    advance=step.advance,
)


def select(device: torch.device) -> Ops:
    """The fastest functions for `device`: the references on a CPU, Triton's and FlashAttention-3 on CUDA."""
    ops = REFERENCE if device.type == "cpu" else _cuda(device)
    structlog.get_logger().info(
        "kernels chosen", **{name: getattr(ops, name).__module__ for name in Ops.__dataclass_fields__}
    )
    return ops


def _cuda(device: torch.device) -> Ops:
    # imported here: none of this exists on a machine without a GPU
    from kernels import (
        flash_attention_3,
        triton_decode_attention,
        triton_linear,
        triton_prefill_attention,
        triton_rope,
        triton_sampling,
        triton_step,
    )

    return Ops(
        norm_linear=triton_linear.norm_linear,
        norm_gated_linear=triton_linear.norm_gated_linear,
        add_linear=triton_linear.add_linear,
        rope_write_kv=triton_rope.rope_write_kv,
        prefill_attention=(
            flash_attention_3 if flash_attention_3.usable(device) else triton_prefill_attention
        ).prefill_attention,
        plan_decode=triton_decode_attention.plan_decode,
        decode_attention=triton_decode_attention.decode_attention,
        sample=triton_sampling.sample,
        locate=triton_step.locate,
        advance=triton_step.advance,
    )
