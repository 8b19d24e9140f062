# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Sampling on CUDA without sorting the vocabulary; `kernels.sampling` holds the reference and says what is kept.

There are two launches:

1. Many programs read all logits once. They write the largest logit and the sum of exponentials of each chunk of the
   vocabulary.
2. One program per row picks the token.
   - A greedy row, or one without filters, needs only those figures and the logits of one chunk.
   - For a row with filters, the figures give a lower bound of the threshold logit. (Top-k: at least k chunks have a
     logit that reaches the k-th largest of the chunks' maxima. Top-p: tokens with logits below t add less than
     CHUNK * e^t to a chunk's sum.) The tokens above the bound, mostly a few hundred, are collected, and the exact
     threshold among them is found by bisection of its bits.
   - Only if too many tokens pass the bound (flat distributions, k in the hundreds), the logits are read again. Each
     pass compares them with four thresholds, until few enough are left between two of them.

Chunks and the order of every sum are fixed, so a row's token does not depend on its batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.triton_launch import dependent, wait_for_previous
from kernels.sampling import SamplingRows

_CHUNK = 512
_TILE_CHUNKS = 4  # chunks that a program of the first launch reads at a time
_GATHER = 16  # chunks that a program of the second launch reads at a time
_CANDIDATES = 4096  # most tokens among which a threshold is found without reading logits again


@triton.jit
def _exponent_scale(temperature):
    """The factor for a logit with which exp2 gives exp(logit / temperature)."""
    return 1.4426950408889634 / tl.maximum(temperature, 1e-30)


@triton.jit
def _key(value):
    """A uint32 for each float32, in the same order."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _value(key):
    """The inverse of `_key`."""
    bits = tl.where((key >> 31) != 0, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _chunk_kernel(
    logits,
    temperature,
    maxima,
    sums,
    stride,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """maxima and sums [B, chunks]: a chunk's largest logit, and its sum of exp((logit - largest) / temperature)."""
    row = tl.program_id(0).to(tl.int64)
    wait_for_previous(DEPENDENT)
    heat = tl.load(temperature + row)
    scale = _exponent_scale(heat)
    for tile in tl.range(0, TILES):
        chunk = (tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        token = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        logit = tl.load(logits + row * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        largest = tl.max(logit, axis=1)
        tl.store(maxima + row * chunks + chunk, largest, mask=chunk < chunks)
        if heat > 0:
            # so that a chunk of nothing but -inf has a sum of 0, not NaN
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            total = tl.sum(tl.exp2((logit - shift[:, None]) * scale), axis=1)
            tl.store(sums + row * chunks + chunk, total, mask=chunk < chunks)


@triton.jit
def _pick(mass, index, size, target):
    """The first index at which the running sum of mass exceeds target (if none: the last with any mass), and the sum
    before it."""
    running = tl.cumsum(mass)
    first = tl.min(tl.where((running > target) & (mass > 0), index, size))
    last = tl.max(tl.where(mass > 0, index, 0))
    picked = tl.where(first < size, first, last)
    return picked, tl.sum(tl.where(index == picked, running - mass, 0.0))


@triton.jit
def _largest_reaching(key, weight, low, high, base, target):
    """The largest t in [low, high] with base + sum(weight where key >= t) >= target. It is assumed to hold for low."""
    while low < high:
        middle = low + (high - low) // 2 + (high - low) % 2
        reaches = base + tl.sum(tl.where(key >= middle, weight, 0)) >= target
        low = tl.where(reaches, middle, low)
        high = tl.where(reaches, high, middle - 1)
    return low


@triton.jit
def _read_chunks(row_logits, hits, first, hit_count, vocab, CHUNK: tl.constexpr, GATHER: tl.constexpr):
    """Token ids and logits of the next GATHER chunks in the list of hits; -inf where there is no chunk or token."""
    slot = first + tl.arange(0, GATHER)
    chunk = tl.load(hits + slot, mask=slot < hit_count, other=0)
    token = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    mask = (slot < hit_count)[:, None] & (token < vocab)
    return token, tl.load(row_logits + token, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _collect(
    row_logits,
    hits,
    hit_count,
    vocab,
    low,
    high,
    values,
    tokens,
    CHUNK: tl.constexpr,
    GATHER: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Writes the logits in [low, high] (above -inf) and their tokens, in token order, as far as there is room. Returns
    how many there are in all."""
    count = 0
    for first in tl.range(0, hit_count, GATHER):
        token, logit = _read_chunks(row_logits, hits, first, hit_count, vocab, CHUNK, GATHER)
        kept = ((logit >= low) & (logit <= high) & (logit > float("-inf"))).to(tl.int32)
        in_chunk = tl.sum(kept, axis=1)
        slot = count + (tl.cumsum(in_chunk) - in_chunk)[:, None] + tl.cumsum(kept, axis=1) - 1
        fits = (kept > 0) & (slot < CANDIDATES)
        tl.store(values + slot, logit, mask=fits)
        tl.store(tokens + slot, token, mask=fits)
        count += tl.sum(in_chunk)
    tl.debug_barrier()
    return count


@triton.jit
def _sum4(logit, weight, t0, t1, t2, t3):
    """The sums of weight over the logits that reach each of four thresholds, in a single reduction."""
    first = tl.join(tl.where(logit >= t0, weight, 0.0), tl.where(logit >= t1, weight, 0.0))
    second = tl.join(tl.where(logit >= t2, weight, 0.0), tl.where(logit >= t3, weight, 0.0))
    first_sums, second_sums = tl.split(tl.sum(tl.join(first, second), axis=0))
    s0, s1 = tl.split(first_sums)
    s2, s3 = tl.split(second_sums)
    return s0, s1, s2, s3


@triton.jit
def _search_logits(
    row_logits,
    hits,
    hit_count,
    vocab,
    largest,
    scale,
    low,
    high,
    target,
    values,
    tokens,
    MASS: tl.constexpr,
    CHUNK: tl.constexpr,
    GATHER: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """The key of the largest logit t for which the tokens with logits >= t weigh at least target. A token weighs 1, or
    with MASS exp((logit - largest) / temperature). low and high are keys: low has enough weight, and no logit is above
    high."""
    above = 0.0  # weight of what is larger than high
    above_count = 0.0
    low_count = 1.0 * vocab  # an upper bound of the tokens that reach low
    passes = 0
    while (low < high) & (low_count - above_count > CANDIDATES):
        # equal steps of the value converge fast for smooth distributions, equal steps of the key for any
        step = tl.maximum((high - low) // 5, 1)
        k0, k1, k2, k3 = low + step, low + 2 * step, low + 3 * step, low + 4 * step
        if (passes < 4) & (_value(low) > -1e30):
            start, fifth = _value(low), (_value(high) - _value(low)) / 5
            k0, k1 = _key(start + fifth), _key(start + 2 * fifth)
            k2, k3 = _key(start + 3 * fifth), _key(start + 4 * fifth)
        k0 = tl.minimum(tl.maximum(k0, low + 1), high)
        k1 = tl.minimum(tl.maximum(k1, low + 1), high)
        k2 = tl.minimum(tl.maximum(k2, low + 1), high)
        k3 = tl.minimum(tl.maximum(k3, low + 1), high)
        t0, t1, t2, t3 = _value(k0), _value(k1), _value(k2), _value(k3)
        n0, n1, n2, n3 = 0.0, 0.0, 0.0, 0.0
        w0, w1, w2, w3 = 0.0, 0.0, 0.0, 0.0
        for first in tl.range(0, hit_count, GATHER):
            _token, logit = _read_chunks(row_logits, hits, first, hit_count, vocab, CHUNK, GATHER)
            logit = tl.reshape(logit, (GATHER * CHUNK,))
            a0, a1, a2, a3 = _sum4(logit, 1.0, t0, t1, t2, t3)
            n0, n1, n2, n3 = n0 + a0, n1 + a1, n2 + a2, n3 + a3
            if MASS:
                a0, a1, a2, a3 = _sum4(logit, tl.exp2((logit - largest) * scale), t0, t1, t2, t3)
                w0, w1, w2, w3 = w0 + a0, w1 + a1, w2 + a2, w3 + a3
        if not MASS:
            w0, w1, w2, w3 = n0, n1, n2, n3
        # thresholds rise, so their weights fall: the last with enough weight is the new low, the next one bounds high
        if w3 >= target:
            low, low_count = k3, n3
        elif w2 >= target:
            low, low_count, high, above, above_count = k2, n2, k3 - 1, w3, n3
        elif w1 >= target:
            low, low_count, high, above, above_count = k1, n1, k2 - 1, w2, n2
        elif w0 >= target:
            low, low_count, high, above, above_count = k0, n0, k1 - 1, w1, n1
        else:
            high, above, above_count = k0 - 1, w0, n0
        passes += 1
    if low < high:
        count = _collect(
            row_logits, hits, hit_count, vocab, _value(low), _value(high), values, tokens, CHUNK, GATHER, CANDIDATES
        )
        slot = tl.arange(0, CANDIDATES)
        logit = tl.load(values + slot, mask=slot < count, other=float("-inf"))
        weight = tl.where(slot < count, 1.0, 0.0)
        if MASS:
            weight *= tl.exp2((logit - largest) * scale)
        low = _largest_reaching(tl.where(slot < count, _key(logit), 0), weight, low, high, above, target)
        tl.debug_barrier()  # all threads have read the candidates before others overwrite them
    return low


@triton.jit
def _draw_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    positions,
    maxima,
    sums,
    hits,
    values,
    tokens,
    out,
    stride,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    GATHER: tl.constexpr,
    CANDIDATES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Draws one row's token. hits [B, chunks] int32, values and tokens [B, CANDIDATES] are scratch. Overwrites sums."""
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * stride
    chunk = tl.arange(0, CHUNKS)
    offset = tl.arange(0, CHUNK)
    wait_for_previous(DEPENDENT)
    maximum = tl.load(maxima + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    largest = tl.max(maximum)
    heat = tl.load(temperature + row)
    if not heat > 0:
        best_chunk = tl.min(tl.where((maximum == largest) & (chunk < chunks), chunk, CHUNKS))
        best_chunk = tl.minimum(best_chunk, chunks - 1)
        token = best_chunk * CHUNK + offset
        logit = tl.load(row_logits + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        best = tl.min(tl.where(logit == largest, token, vocab))
        tl.store(out + row, tl.minimum(best, vocab - 1))
        return

    scale = _exponent_scale(heat)
    word, _1, _2, _3 = tl.philox(tl.load(seeds + row), tl.load(positions + row).to(tl.uint32), 0, 0, 0)
    u = (word >> 8).to(tl.float32) * 5.9604644775390625e-8  # 2^-24
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    least = tl.load(min_p + row)
    limits_k = (k > 0) & (k < vocab)
    limits_p = p < 1
    partial = tl.load(sums + row * chunks + chunk, mask=chunk < chunks, other=0.0)
    mass = tl.where(chunk < chunks, partial * tl.exp2((maximum - largest) * scale), 0.0)
    whole = tl.sum(mass)
    threshold = float("-inf")
    decided = False

    if limits_k | limits_p | (least > 0):
        if limits_k:
            keys = tl.where(chunk < chunks, _key(maximum), 0)
            bound = float("-inf")
            if k <= chunks:
                bound = _value(
                    _largest_reaching(keys, tl.full((CHUNKS,), 1, tl.int32), _key(bound), _key(largest), 0, k)
                )
        elif limits_p:
            # Bisects for the smallest drop at which tokens of at least 2^-drop of the largest surely have enough mass.
            # Of a chunk, that is at least its maximum, and at least its sum less the most that tokens below can hold.
            near, far = 0.0, 64.0
            for _step in tl.range(0, 12):
                drop = (near + far) / 2
                sure = tl.maximum(tl.exp2((maximum - largest) * scale), mass - (CHUNK - 1) * tl.exp2(-drop))
                sure = tl.where((maximum - largest) * scale >= -drop, sure, 0.0)
                reaches = tl.sum(sure) >= p * whole * 1.00001
                far = tl.where(reaches, drop, far)
                near = tl.where(reaches, near, drop)
            bound = tl.where(far < 64.0, largest - far / scale, float("-inf"))
        else:
            bound = largest + (tl.log2(least) - 0.001) / scale
        is_hit = ((maximum >= bound) & (chunk < chunks)).to(tl.int32)
        row_hits = hits + row * chunks
        tl.store(row_hits + tl.cumsum(is_hit) - 1, chunk, mask=is_hit > 0)
        hit_count = tl.sum(is_hit)
        tl.debug_barrier()
        row_values = values + row * CANDIDATES
        row_tokens = tokens + row * CANDIDATES
        count = _collect(
            row_logits, row_hits, hit_count, vocab, bound, largest, row_values, row_tokens, CHUNK, GATHER, CANDIDATES
        )
        low, high = _key(bound), _key(largest)
        if count <= CANDIDATES:
            slot = tl.arange(0, CANDIDATES)
            logit = tl.load(row_values + slot, mask=slot < count, other=float("-inf"))
            weight = tl.where(slot < count, tl.exp2((logit - largest) * scale), 0.0)
            key = tl.where(slot < count, _key(logit), 0)
            if limits_k:
                low = _largest_reaching(key, tl.where(slot < count, 1, 0), low, high, 0, k)
                weight = tl.where(key >= low, weight, 0.0)
                whole = tl.sum(weight)
            if limits_p:
                low = _largest_reaching(key, weight, low, high, 0.0, p * whole)
                weight = tl.where(key >= low, weight, 0.0)
            weight = tl.where(weight >= least, weight, 0.0)
            picked, _before = _pick(weight, slot, CANDIDATES, u * tl.sum(weight))
            # no candidate: logits are NaN
            tl.store(out + row, tl.load(row_tokens + picked, mask=picked < count, other=0))
            decided = True
        else:
            if limits_k:
                low = _search_logits(
                    row_logits, row_hits, hit_count, vocab, largest, scale, low, high, 1.0 * k,
                    row_values, row_tokens, False, CHUNK, GATHER, CANDIDATES,
                )  # fmt: skip
                whole = 0.0
                for first in tl.range(0, hit_count, GATHER):
                    _token, logit = _read_chunks(row_logits, row_hits, first, hit_count, vocab, CHUNK, GATHER)
                    weight = tl.where(logit >= _value(low), tl.exp2((logit - largest) * scale), 0.0)
                    whole += tl.sum(weight)
            if limits_p:
                low = _search_logits(
                    row_logits, row_hits, hit_count, vocab, largest, scale, low, high, p * whole,
                    row_values, row_tokens, True, CHUNK, GATHER, CANDIDATES,
                )  # fmt: skip
            threshold = _value(low)
            tl.store(sums + row * chunks + chunk, tl.zeros((CHUNKS,), tl.float32), mask=chunk < chunks)
            tl.debug_barrier()
            for first in tl.range(0, hit_count, GATHER):
                _token, logit = _read_chunks(row_logits, row_hits, first, hit_count, vocab, CHUNK, GATHER)
                weight = tl.exp2((logit - largest) * scale)
                weight = tl.where((logit >= threshold) & (weight >= least), weight, 0.0)
                slot = first + tl.arange(0, GATHER)
                hit = tl.load(row_hits + slot, mask=slot < hit_count, other=0)
                tl.store(sums + row * chunks + hit, tl.sum(weight, axis=1), mask=slot < hit_count)
            tl.debug_barrier()
            mass = tl.load(sums + row * chunks + chunk, mask=chunk < chunks, other=0.0)

    if not decided:
        target = u * tl.sum(mass)
        drawn_chunk, before = _pick(mass, chunk, CHUNKS, target)
        token = drawn_chunk * CHUNK + offset
        logit = tl.load(row_logits + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        weight = tl.exp2((logit - largest) * scale)
        weight = tl.where((logit >= threshold) & (weight >= least), weight, 0.0)
        picked, _before = _pick(weight, offset, CHUNK, target - before)
        tl.store(out + row, tl.minimum(drawn_chunk * CHUNK + picked, vocab - 1))


def sample(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """`kernels.sampling.sample` for CUDA tensors; logits have a contiguous last dimension. Equal to the reference up to
    the rounding of sums. Always two launches, whatever the rows ask for, so it can be captured in a graph."""
    batch, vocab = logits.shape
    device = logits.device
    out = torch.empty(batch, dtype=torch.int32, device=device)
    if not batch:
        return out
    chunks = triton.cdiv(vocab, _CHUNK)
    maxima = torch.empty((batch, chunks), dtype=torch.float32, device=device)
    sums = torch.empty_like(maxima)
    hits = torch.empty((batch, chunks), dtype=torch.int32, device=device)
    values = torch.empty((batch, _CANDIDATES), dtype=torch.float32, device=device)
    tokens = torch.empty((batch, _CANDIDATES), dtype=torch.int32, device=device)
    tiles = 1 if batch < 64 else 4
    _chunk_kernel[(batch, triton.cdiv(chunks, _TILE_CHUNKS * tiles))](
        logits,
        rows.temperature,
        maxima,
        sums,
        logits.stride(0),
        vocab,
        chunks,
        CHUNK=_CHUNK,
        ROWS=_TILE_CHUNKS,
        TILES=tiles,
        num_warps=4,
        **dependent(device),
    )
    _draw_kernel[(batch,)](
        logits,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        rows.seeds,
        positions,
        maxima,
        sums,
        hits,
        values,
        tokens,
        out,
        logits.stride(0),
        vocab,
        chunks,
        CHUNK=_CHUNK,
        CHUNKS=triton.next_power_of_2(chunks),
        GATHER=_GATHER,
        CANDIDATES=_CANDIDATES,
        num_warps=8,
        **dependent(device),
    )
    return out
