"""Rotary position embedding (Su et al., "RoFormer", 2021), and writing K and V to a paged cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fp8 import E4M3, rounded
from kernels.norm import rms_norm


@dataclass(frozen=True, slots=True)
class Rotation:
    """How to norm and rotate q and k, and where to write k and v, for T tokens of one layer."""

    positions: Tensor  # [T] int32 or int64
    cos_sin: Tensor  # [max_position, D] float32: cosines of the D/2 frequencies, then their sines
    slots: Tensor  # [T] int32 or int64: block * block_size + offset, -1 writes nothing
    q_norm: Tensor | None  # [D]: weight of an RMS norm of each head, before the rotation (Qwen3 has it)
    k_norm: Tensor | None  # [D]; set if and only if q_norm is
    eps: float  # of the norms


def rope_write_kv(
    qkv: Tensor, rotation: Rotation, key_cache: Tensor, value_cache: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Norms (if there are norms) and rotates q and k in place, and writes k and v to their slots.

    qkv [T, (Hq + 2 Hkv) * D], contiguous: heads of q, then of k, then of v. key_cache, value_cache [N, block_size, Hkv,
    D], strided views. Dimension i is paired with i + D/2 (the layout of NeoX and of Hugging Face's checkpoints). The
    rotation is computed in float32. Returns views of qkv: q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D].

    Caches are of qkv's dtype or E4M3. For the latter k and v are rounded, and those returned are, too: a token attends
    to the same values whether it reads them from a cache or has just made them.
    """
    block_size, num_kv_heads, head_dim = key_cache.shape[1:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = torch.split(heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    if rotation.q_norm is not None and rotation.k_norm is not None:
        q.copy_(rms_norm(q, rotation.q_norm, rotation.eps))
        k.copy_(rms_norm(k, rotation.k_norm, rotation.eps))

    cos, sin = rotation.cos_sin.index_select(0, rotation.positions).unsqueeze(1).chunk(2, dim=-1)
    low, high = heads[:, :-num_kv_heads].chunk(2, dim=-1)
    rotated_low = low * cos - high * sin
    high.copy_(high * cos + low * sin)
    low.copy_(rotated_low)

    if key_cache.dtype == E4M3:
        kv = heads[:, -2 * num_kv_heads :]
        kv.copy_(rounded(kv))
    slots = rotation.slots
    if bool((slots < 0).any()):
        kept = slots >= 0
        slots, written_k, written_v = slots[kept], k[kept], v[kept]
    else:
        written_k, written_v = k, v
    where = (slots // block_size, slots % block_size)
    key_cache.index_put_(where, written_k.to(key_cache.dtype))
    value_cache.index_put_(where, written_v.to(value_cache.dtype))
    return q, k, v
