"""Each Triton kernel against its torch reference; test modules and `tests/gpu` choose the shapes.

Outputs are allocated by the kernels' wrappers, so unwritten elements are whatever the allocator left there: on the GPU
`poison` fills that memory with NaN first.
"""

from collections.abc import Callable
from statistics import mean, pvariance

import numpy as np
import torch
import triton
from torch import Tensor

from kernels import activation, drafts, experts, linear, norm, rope, sampling, step
from kernels.cuda import (
    fastest_linear,
    triton_activation,
    triton_decode_attention,
    triton_drafts,
    triton_experts,
    triton_norm,
    triton_prefill_attention,
    triton_rope,
    triton_sampling,
    triton_step,
)
from kernels.fp8 import E4M3
from kernels.hidden import Hidden
from kernels.sampling import SamplingRows
from tests.kernels.inputs import (
    DEVICE,
    INTERPRETED,
    ROUNDED_TOLERANCE,
    assert_close,
    causal_attention,
    paged,
    prefill_batch,
    randn,
)

if INTERPRETED and triton.__version__.startswith("3.6") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    raise ImportError("the interpreter of Triton 3.6 needs numpy < 2.4")
if INTERPRETED:
    from tests.kernels.interpreted_float8 import mend

    mend()


def poison(elements: int, dtype: torch.dtype) -> None:
    """Leaves NaN in the memory that the next allocations of this size will get."""
    for _ in range(2):
        torch.full((max(elements, 1),), torch.nan, dtype=dtype, device=DEVICE)


def check_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, width, dtype=dtype, seed=1), randn(width, dtype=dtype, seed=2)
    poison(x.numel(), dtype)
    expected = norm.rms_norm(x.double(), weight.double(), 1e-5)
    assert_close(triton_norm.rms_norm(x, weight, 1e-5), expected)


def check_linear(
    rows: int, outputs: int, inputs: int, with_bias: bool, dtype: torch.dtype, between_rows: int = 16
) -> None:
    """norm_linear and add_linear. x is a part of wider rows."""
    x = randn(rows, inputs + between_rows, dtype=dtype, seed=1)[:, :inputs]
    weight = randn(outputs, inputs, dtype=dtype, seed=2).div_(inputs**0.5)
    scale = randn(inputs, dtype=dtype, seed=3)
    bias = randn(outputs, dtype=dtype, seed=4) if with_bias else None
    wide_bias = None if bias is None else bias.double()
    poison(rows * outputs, dtype)
    actual = fastest_linear.norm_linear(Hidden(x), scale, 1e-5, weight, bias)
    assert_close(actual, linear.norm_linear(Hidden(x.double()), scale.double(), 1e-5, weight.double(), wide_bias))

    residual = randn(rows, outputs, dtype=dtype, seed=5)
    expected = linear.add_linear(Hidden(residual.double()), x.double(), weight.double(), wide_bias, None)
    added = fastest_linear.add_linear(Hidden(residual), x, weight, bias, None)
    assert added.states.data_ptr() == residual.data_ptr()
    assert_close(added.states, expected.states)


def check_norm_gated_linear(rows: int, intermediate: int, inputs: int, dtype: torch.dtype) -> None:
    x = randn(rows, inputs, dtype=dtype, seed=1)
    gate_up = randn(2 * intermediate, inputs, dtype=dtype, seed=2).div_(inputs**0.5)
    scale = randn(inputs, dtype=dtype, seed=3)
    poison(rows * intermediate, dtype)
    actual = fastest_linear.norm_gated_linear(Hidden(x), scale, 1e-5, gate_up)
    assert_close(actual, linear.norm_gated_linear(Hidden(x.double()), scale.double(), 1e-5, gate_up.double()))


def check_choose(tokens: int, count: int, per_token: int, normalized: bool, dtype: torch.dtype) -> None:
    order = [torch.randperm(count, generator=torch.Generator().manual_seed(token)) for token in range(tokens)]
    scores = ((torch.stack(order) - count // 2) / 32).to(dtype).to(DEVICE)  # no two are equal
    shares, chosen = triton_experts.choose(scores, per_token, normalized)
    expected_shares, expected = experts.choose(scores, per_token, normalized)
    assert torch.equal(chosen.long(), expected)
    assert_close(shares, expected_shares)


def check_choose_of_bad_scores(bad: float, normalized: bool) -> None:
    scores = randn(4, 11)
    scores[0, 10] = scores[1, 0] = scores[2] = bad
    shares, chosen = triton_experts.choose(scores, 3, normalized)
    expected_shares, expected = experts.choose(scores, 3, normalized)
    torch.testing.assert_close(shares, expected_shares, equal_nan=True)
    sound = ~expected_shares.isnan()
    assert torch.equal(chosen[sound].long(), expected[sound])
    assert all(len({*row}) == 3 and {*row} <= {*range(11)} for row in chosen.tolist())


def check_sort(tokens: int, count: int, per_token: int) -> None:
    chosen = torch.randint(count, (tokens, per_token), generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    order, starts = triton_experts.sort(chosen, count)
    assert torch.equal(order.long(), chosen.flatten().argsort(stable=True))
    sizes = chosen.flatten().long().bincount(minlength=count)
    assert starts.tolist() == [0, *sizes.cumsum(0).tolist()]


def check_mix(
    tokens: int, hidden: int, intermediate: int, count: int, per_token: int, dtype: torch.dtype, used: int | None = None
) -> None:
    """used: only so many of the experts are chosen."""
    gate_up = randn(count, 2 * intermediate, hidden, dtype=dtype, seed=1).div_(hidden**0.5)
    down = randn(count, hidden, intermediate, dtype=dtype, seed=2).div_(intermediate**0.5)
    router = randn(count, hidden, dtype=dtype, seed=3)
    x, states = (randn(tokens, hidden, dtype=dtype, seed=seed) for seed in (4, 5))
    scores = randn(tokens, count, seed=6)
    scores[:, used or count :] = -torch.inf
    shares, chosen = experts.choose(scores, per_token, True)
    expected = states.double() + experts.mix(x.double(), shares.double(), chosen, gate_up.double(), down.double())
    poison(tokens * per_token * hidden, dtype)
    weights = experts.Experts(router, gate_up, down, per_token, True)
    triton_experts.add_mix(states, x, shares, chosen.int(), weights)
    assert_close(states, expected)


def check_add_experts(tokens: int, normalized: bool, dtype: torch.dtype) -> None:
    """The first feature makes two experts the best ones, so that no rounding of scores can choose others."""
    count, hidden, intermediate = 4, 192, 72
    gate_up = randn(count, 2 * intermediate, hidden, dtype=dtype, seed=1).div_(hidden**0.5)
    down = randn(count, hidden, intermediate, dtype=dtype, seed=2).div_(intermediate**0.5)
    router = randn(count, hidden, dtype=dtype, seed=3).div_(8 * hidden**0.5)
    norm_weight, states = randn(hidden, dtype=dtype, seed=4), randn(tokens, hidden, dtype=dtype, seed=5)
    router[1:3, 0] = norm_weight[0] = states[:, 0] = 1
    wide = experts.Experts(router.double(), gate_up.double(), down.double(), 2, normalized)
    expected = experts.add_experts(Hidden(states.double()), norm_weight.double(), 1e-5, wide)
    poison(tokens * 2 * intermediate, dtype)
    weights = experts.Experts(router, gate_up, down, 2, normalized)
    added = triton_experts.add_experts(Hidden(states), norm_weight, 1e-5, weights)
    assert added.states.data_ptr() == states.data_ptr()
    assert_close(added.states, expected.states)


def check_step(rows: int, block_size: int, *, history: int = 0) -> None:
    """Bit for bit; every third row has no sequence. `history`: tokens of a sequence that are kept."""
    lengths = torch.arange(rows, dtype=torch.int32, device=DEVICE) * 7 % (4 * block_size)
    lengths[2::3] = -1
    order = torch.randperm(4 * rows, generator=torch.Generator().manual_seed(0))
    block_tables = order.int().view(rows, 4).to(DEVICE)
    for mine, theirs in zip(
        triton_step.locate(lengths, block_tables, block_size),
        step.locate(lengths, block_tables, block_size),
        strict=True,
    ):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    drawn = torch.arange(rows, dtype=torch.int32, device=DEVICE) + 100
    tokens, texts = torch.zeros_like(drawn), torch.zeros((rows, history), dtype=torch.int32, device=DEVICE)
    expected_lengths, expected_texts = lengths.clone(), texts.clone()
    step.advance(tokens.clone(), expected_lengths, expected_texts, drawn)
    triton_step.advance(tokens, lengths, texts, drawn)
    assert torch.equal(tokens, drawn)
    assert torch.equal(lengths, expected_lengths)
    assert torch.equal(texts, expected_texts)


def check_drafts(lengths: list[int], count: int, block_size: int, vocab: int = 3) -> None:
    """Drafts behind sequences of these lengths, some of which have little room left, and what is kept of them; bit for
    bit. A small vocabulary makes many matches, and many drafts right."""
    generator = torch.Generator().manual_seed(len(lengths) + count)
    room = max(lengths) + 2 * count + 2
    blocks = -(-room // block_size)
    tables = torch.randperm(len(lengths) * blocks, generator=generator).int().view(len(lengths), blocks).to(DEVICE)
    history = torch.randint(vocab, (len(lengths), room), generator=generator, dtype=torch.int32).to(DEVICE)
    known = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    limits = known + torch.randint(1, 2 * count + 2, known.shape, generator=generator, dtype=torch.int32).to(DEVICE)
    expected = drafts.draft(known.cpu(), limits.cpu(), history.cpu(), tables.cpu(), count, block_size)
    rows = triton_drafts.draft(known, limits, history, tables, count, block_size)
    used = len(expected.tokens)
    assert len(rows.tokens) == len(lengths) * (count + 1)
    for name, padding in (("tokens", 0), ("positions", 0), ("slots", -1), ("owners", 0)):
        mine, theirs = getattr(rows, name).cpu(), getattr(expected, name)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine[:used], theirs), name
        assert (mine[used:] == padding).all(), name
    assert torch.equal(rows.attention.cu_query_lens.cpu(), expected.attention.cu_query_lens)
    assert torch.equal(rows.attention.seq_lens.cpu(), expected.attention.seq_lens)

    drawn = torch.randint(vocab, (len(rows.tokens),), generator=generator, dtype=torch.int32)
    follows = torch.arange(used - 1)
    right = follows[torch.rand(used - 1, generator=generator) < 0.7]
    drawn[right] = expected.tokens[right + 1]
    tokens = torch.zeros_like(known)
    theirs_in_place = tokens.cpu(), known.cpu(), history.cpu()
    theirs = drafts.accept(*theirs_in_place, expected, drawn[:used], count)
    mine = triton_drafts.accept(tokens, known, history, rows, drawn.to(DEVICE), count)
    assert torch.equal(mine.cpu(), theirs)
    for left, right in zip((tokens, known, history), theirs_in_place, strict=True):
        assert torch.equal(left.cpu(), right)


def check_silu_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = randn(rows, 2 * width, dtype=dtype, seed=1) * 4
    poison(rows * width, dtype)
    assert_close(triton_activation.silu_mul(gate_up), activation.silu_mul(gate_up.double()))


def check_rope_write_kv(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    with_norm: bool,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
) -> None:
    """Against the reference in the same dtype, bit for bit but for rounding; every third token has no slot."""
    caches = paged((tokens,), kv_heads, head_dim, block_size, dtype, cache_dtype)
    untouched = 256.0
    caches.key_cache.fill_(untouched)
    caches.value_cache.fill_(untouched)
    num_slots = caches.key_cache.shape[0] * block_size
    slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(0))[:tokens].to(DEVICE)
    slots[2::3] = -1
    positions = torch.arange(tokens, device=DEVICE).flip(0)
    cos_sin = randn(tokens, head_dim, seed=5)
    weights = [randn(head_dim, dtype=dtype, seed=seed) if with_norm else None for seed in (6, 7)]
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=4)

    expected_qkv = qkv.clone()
    expected_keys, expected_values = caches.key_cache.clone(), caches.value_cache.clone()
    rotation = rope.Rotation(positions, cos_sin, slots, weights[0], weights[1], 1e-6)
    expected = rope.rope_write_kv(expected_qkv, rotation, expected_keys, expected_values)
    actual = triton_rope.rope_write_kv(qkv, rotation, caches.key_cache, caches.value_cache)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.data_ptr() >= qkv.data_ptr()
        assert_close(mine, theirs, ROUNDED_TOLERANCE if cache_dtype == E4M3 else None)
    if cache_dtype == E4M3:
        kept = slots >= 0
        where = (slots[kept] // block_size, slots[kept] % block_size)
        assert torch.equal(caches.key_cache[where].float(), actual[1][kept].float())
        assert torch.equal(caches.value_cache[where].float(), actual[2][kept].float())
    keys, values = _numbers(caches.key_cache), _numbers(caches.value_cache)
    _assert_keys_close(caches.key_cache, expected_keys)
    assert torch.equal(values, _numbers(expected_values))
    assert torch.equal(keys == untouched, _numbers(expected_keys) == untouched)


def check_decode_attention(
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    with_norm: bool = False,
    cache_dtype: torch.dtype | None = None,
) -> None:
    """lengths may hold 0, a padded row. The caches have all but the last token, which comes in qkv."""
    caches = paged(lengths, kv_heads, head_dim, block_size, dtype, cache_dtype)
    qkv = randn(len(lengths), (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=99)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    positions, slots, _ = step.locate(seq_lens - 1, caches.block_tables, block_size)
    norms = [randn(head_dim, dtype=dtype, seed=seed) if with_norm else None for seed in (6, 7)]
    angles = torch.outer(torch.arange(max(lengths) + 1), 0.3 ** torch.arange(head_dim // 2)).to(DEVICE)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    rotation = rope.Rotation(positions, cos_sin, slots, norms[0], norms[1], 1e-6)
    scale = head_dim**-0.5
    expected_keys, expected_values = caches.key_cache.clone(), caches.value_cache.clone()
    q, _, _ = rope.rope_write_kv(qkv.clone(), rotation, expected_keys, expected_values)

    poison(q.numel(), dtype)
    batch = triton_decode_attention.plan_decode(caches.block_tables, seq_lens, caches.key_cache)
    attended = (rotation, caches.key_cache, caches.value_cache, batch, scale)
    actual = triton_decode_attention.decode_attention(qkv.clone(), *attended)
    _assert_keys_close(caches.key_cache, expected_keys)
    assert torch.equal(_numbers(caches.value_cache), _numbers(expected_values))
    new = (slots // block_size, slots % block_size)
    k, v = caches.key_cache[new].to(dtype), caches.value_cache[new].to(dtype)
    for row, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(actual[row], torch.zeros_like(actual[row]))
        else:
            keys = torch.cat([caches.keys[row][:-1], k[row : row + 1]])
            values = torch.cat([caches.values[row][:-1], v[row : row + 1]])
            assert_close(actual[row : row + 1], causal_attention(q[row : row + 1], keys, values, scale))
    # the merge left its counters as it found them
    assert torch.equal(actual, triton_decode_attention.decode_attention(qkv.clone(), *attended))


def check_decode_plan(lengths: tuple[int, ...], kv_heads: int) -> None:
    """Every cached key is in one item, a sequence's items are neighbours, and longer ones come first."""
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    key_cache = torch.empty(1, 16, kv_heads, 64, device=DEVICE)
    plan = triton_decode_attention.plan_decode(seq_lens[:, None], seq_lens, key_cache).plan.T.tolist()
    items = [item for item in plan if item[0] >= 0]
    assert plan[: len(items)] == items, "programs without work come last"
    assert all(item[4] <= len(plan) for item in items)
    for row, length in enumerate(lengths):
        numbers = [number for number, item in enumerate(items) if item[0] == row]
        own = [items[number] for number in numbers]
        assert numbers == list(range(own[0][3], own[0][4]))
        assert all(item[3:] == own[0][3:] for item in own)
        assert [start for _, start, *_ in own] == [0, *(end for _, _, end, *_ in own[:-1])]
        assert own[-1][2] == length - 1
    tile = triton_decode_attention._tile(64, torch.float32)[0]
    tiles = [
        max(-(-(end - start) // tile), 1) for _, start, end, first, _ in items if items[first][1:3] == [start, end]
    ]
    assert tiles == sorted(tiles, reverse=True)
    shares = triton_decode_attention._shares(kv_heads, DEVICE)
    keys = [max(length - 1, 1) for length in lengths]
    share = -(-sum(keys) // shares)
    real = [count for count, length in zip(keys, lengths, strict=True) if length]
    uneven = len(real) > 1 and pvariance(real) > 0.02 * mean(real) ** 2
    limit = share if uneven else 5 * share // 2
    at_once = triton_decode_attention._at_once(kv_heads, DEVICE)
    cuts_last_wave = len(real) > at_once and not uneven and max(keys) <= limit
    last_wave = len(real) % at_once if cuts_last_wave else 0
    in_last_wave = [row for row, length in enumerate(lengths) if length][len(real) - last_wave :]
    for row, count in enumerate(keys):
        own = [end - start for owner, start, end, *_ in items if owner == row]
        if row in in_last_wave:
            most = -(-count // min(at_once // last_wave, 1 + shares // last_wave))
            assert max(own) == min(-(-most // tile) * tile, count)
            continue
        assert len(own) == 1 if count <= limit else len(own) > 1 or count <= tile
        # a piece is about a share, in whole tiles
        assert max(own) <= max(limit, 5 * share // 4 + tile)


def _assert_keys_close(actual: Tensor, expected: Tensor) -> None:
    assert_close(_numbers(actual), _numbers(expected), ROUNDED_TOLERANCE if actual.dtype == E4M3 else None)


def _numbers(cache: Tensor) -> Tensor:
    """Unused slots hold NaN, which equals nothing. 8-bit floats become float32, since torch compares none."""
    return (cache.float() if cache.dtype == E4M3 else cache).nan_to_num(nan=12345.0)


def check_prefill_attention(
    query_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    padding: tuple[int, int] = (0, 0),
    attend: Callable[..., Tensor] = triton_prefill_attention.prefill_attention,
    cache_dtype: torch.dtype | None = None,
) -> None:
    """`padding`: tokens and sequences that a batch of a fixed size has too many."""
    caches = paged(kv_lens, kv_heads, head_dim, block_size, dtype, cache_dtype)
    tokens = sum(query_lens) + padding[0]
    qkv = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, seed=99)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    own = sum(query_lens)
    k[:own] = torch.cat([key[len(key) - n :] for key, n in zip(caches.keys, query_lens, strict=True)])
    v[:own] = torch.cat([value[len(value) - n :] for value, n in zip(caches.values, query_lens, strict=True)])
    scale = head_dim**-0.5
    batch = prefill_batch(query_lens, kv_lens, caches.block_tables, padding[1])
    poison(q.numel(), dtype)
    actual = attend(q, k, v, caches.key_cache, caches.value_cache, batch, scale)
    expected = [
        causal_attention(queries, key, value, scale)
        for queries, key, value in zip(q[:own].split(list(query_lens)), caches.keys, caches.values, strict=True)
    ]
    assert_close(actual[:own], torch.cat(expected))


def check_sample(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """Equal tokens, but where the draw or the nucleus' edge is nearer than float32 sums can tell. Returns them."""
    actual = triton_sampling.sample(logits, rows, positions)
    expected = sampling.sample(logits, rows, positions)
    u = sampling.philox_uniform(rows.seeds, positions).double()
    for row in (actual != expected).nonzero().flatten().tolist():
        assert rows.temperature[row] > 0, f"row {row}: greedy took {actual[row]}, not {expected[row]}"
        scaled = logits[row].double() / rows.temperature[row].double()
        filters = rows.top_k[row], rows.top_p[row], rows.min_p[row]
        wide, narrow = (_running(scaled, *filters, slack) for slack in (1e-5, -1e-5))
        token = int(actual[row])
        near = [
            running[token] + 1e-5 >= u[row] >= (running[token - 1] if token else 0.0) - 1e-5
            for running in (wide, narrow)
        ]
        assert any(near), f"row {row}: took {token}, not {expected[row]}"
    # the reference rounds too: where a token's share is as small as what sums lose, its neighbour is drawn now and then
    shares = (logits.double() / rows.temperature.double().clamp(min=1e-6)[:, None]).softmax(-1)
    drawn_share = float(shares.square().sum(-1).mean())
    assert (actual != expected).float().mean() < 0.02 + 1e-6 / drawn_share
    return actual


def _running(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, slack: float) -> Tensor:
    """The kept tokens' running share, of a nucleus that is wider by `slack`."""
    if top_k > 0:
        least = scaled.topk(min(int(top_k), len(scaled))).values[-1]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    p = scaled.softmax(-1)
    if top_p < 1:
        largest = p.sort(descending=True).values
        inside = largest.cumsum(0) - largest < top_p + slack
        p = p.masked_fill(p < largest[inside].min(), 0.0)
    p = p.masked_fill(p < (min_p - slack * (min_p > 0)) * p.max(), 0.0)
    return (p.cumsum(0) / p.sum()).double()
