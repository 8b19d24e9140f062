"""The Triton kernels, compiled, against their references at the sizes of serving; `tests/kernels` has small ones."""

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():  # importing the kernels here would keep tests/kernels from interpreting them
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from kernels.cuda import fastest_linear, flash_attention_3, triton_decode_attention, triton_launch, triton_sampling
from kernels.fp8 import E4M3
from kernels.hidden import Hidden
from kernels.rope import Rotation
from kernels.sampling import SamplingRows
from tests.kernels import checks
from tests.kernels.inputs import DEVICE, assert_close, causal_attention, paged, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS = [(9, 3, 64), (16, 8, 128), (32, 8, 128), (32, 32, 80), (28, 4, 128), (16, 8, 96), (16, 4, 256)]
VOCAB = 151_936


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 64, 8192])
@pytest.mark.parametrize("width", [576, 1024, 4096, 8192])
def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    checks.check_rms_norm(rows, width, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (256, 3072), (2048, 14_336)])
def test_silu_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    checks.check_silu_mul(rows, width, dtype)


# (outputs, inputs): qkv, output, down and lm_head of SmolLM2, Qwen3-0.6B and Llama-3.1-8B, and Qwen2-1.5B's qkv
LINEARS = [(960, 576), (576, 1536), (4096, 1024), (1024, 3072), (6144, 4096), (4096, 14_336), (2048, 1536)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 16, 64, 100, 256, 300])
@pytest.mark.parametrize(("outputs", "inputs"), LINEARS)
def test_linear(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    checks.check_linear(rows, outputs, inputs, (outputs, inputs) == (2048, 1536), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 16, 64, 100, 256, 300])
@pytest.mark.parametrize(("intermediate", "inputs"), [(1536, 576), (3072, 1024), (14_336, 4096)])
def test_norm_gated_linear(rows: int, intermediate: int, inputs: int, dtype: torch.dtype) -> None:
    checks.check_norm_gated_linear(rows, intermediate, inputs, dtype)


@pytest.mark.parametrize("rows", [5, 70, 256])
@pytest.mark.parametrize(("outputs", "inputs"), [(50, 64), (1000, 192), (33, 4096), (96, 16_384)])
def test_odd_tiles(rows: int, outputs: int, inputs: int) -> None:
    checks.check_linear(rows, outputs, inputs, True, torch.float16)
    checks.check_norm_gated_linear(rows, outputs, inputs, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 1500])
@pytest.mark.parametrize(("hidden", "intermediate", "count", "per_token"), [(2048, 768, 32, 8), (1024, 3584, 8, 2)])
def test_experts(tokens: int, hidden: int, intermediate: int, count: int, per_token: int, dtype: torch.dtype) -> None:
    checks.check_choose(tokens, 128, per_token, True, dtype)
    checks.check_sort(tokens, count, per_token)
    checks.check_mix(tokens, hidden, intermediate, count, per_token, dtype)
    checks.check_add_experts(tokens, count == 8, dtype)


def test_logits_of_many_tokens() -> None:
    checks.check_linear(1, VOCAB, 1024, False, torch.bfloat16)


def test_step() -> None:
    checks.check_step(300, 16)
    checks.check_step(300, 16, history=70)


@pytest.mark.parametrize("count", [1, 4, 15])
@pytest.mark.parametrize("lengths", [[0], [5, -1, 100, 2047, 2048, 2049], [*range(51)], [100_000, 3, 40_000]])
def test_drafts(lengths: list[int], count: int) -> None:
    checks.check_drafts(lengths, count, 16)
    checks.check_drafts(lengths, count, 16, vocab=50_000)


def test_kernels_that_start_early_wait_for_what_they_read() -> None:
    """A chain of short kernels, each reading what the one before wrote: the same tokens' values whether or not a kernel
    may start before the one before it has ended."""
    hidden, intermediate, tokens = 1024, 3072, (1, 3, 40, 200)
    norm = randn(hidden, dtype=torch.bfloat16, seed=1)
    gate_up = randn(2 * intermediate, hidden, dtype=torch.bfloat16, seed=2).mul_(hidden**-0.5)
    down = randn(hidden, intermediate, dtype=torch.bfloat16, seed=3).mul_(intermediate**-0.5)

    def run(start: Tensor) -> Tensor:
        residual = Hidden(start.clone())
        for _ in range(50):
            activated = fastest_linear.norm_gated_linear(residual, norm, 1e-6, gate_up)
            residual = fastest_linear.add_linear(residual, activated, down, None, norm)
        return residual.states

    for rows in tokens:
        start = randn(rows, hidden, dtype=torch.bfloat16, seed=rows)
        run(start)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            early = run(start)
        triton_launch.enabled = False
        try:
            in_order = run(start)
        finally:
            triton_launch.enabled = True
        for _ in range(20):
            early.fill_(torch.nan)
            graph.replay()
            assert torch.equal(early, in_order)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_rope_write_kv(heads: int, kv_heads: int, head_dim: int, with_norm: bool, dtype: torch.dtype) -> None:
    checks.check_rope_write_kv(1000, heads, kv_heads, head_dim, 16, with_norm, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 48, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_decode_attention(heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    lengths = (1, 1000, 0, 63, 64, 65, 2500, 7)
    checks.check_decode_attention(lengths, heads, kv_heads, head_dim, block_size, dtype, with_norm=heads % 3 == 1)


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no 8-bit floats")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_8_bit_kv(heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    shape = (heads, kv_heads, head_dim, block_size)
    with_norm = heads % 3 == 1
    checks.check_rope_write_kv(1000, *shape, with_norm, dtype, cache_dtype=E4M3)
    lengths = (1, 1000, 0, 63, 64, 65, 2500, 7)
    checks.check_decode_attention(lengths, *shape, dtype, with_norm, cache_dtype=E4M3)
    checks.check_decode_attention(tuple(range(1, 600, 5)), *shape, dtype, with_norm, cache_dtype=E4M3)
    checks.check_prefill_attention((513, 1, 128), (513, 777, 1000), *shape, dtype, cache_dtype=E4M3)


@pytest.mark.parametrize("lengths", [(20_000,), tuple(range(1, 600, 5))], ids=["long", "many"])
def test_decode_attention_lengths(lengths: tuple[int, ...]) -> None:
    checks.check_decode_attention(lengths, 16, 8, 128, 16, torch.bfloat16)


def test_decode_attention_in_a_graph_follows_lengths() -> None:
    """Captured once; lengths and tables change between replays, also from one piece to many."""
    caches = paged((3000, 700), 8, 128, 16, torch.bfloat16)
    qkv = randn(2, 32 * 128, dtype=torch.bfloat16)
    v = qkv.view(2, 32, 128)[:, 24:]
    seq_lens = torch.tensor([3000, 700], dtype=torch.int32, device=DEVICE)
    tables = caches.block_tables.clone()
    unturned = torch.cat([torch.ones(3000, 64), torch.zeros(3000, 64)], dim=1).to(DEVICE)
    slots = torch.full((2,), -1, device=DEVICE)
    rotation = Rotation(seq_lens.clone(), unturned, slots, None, None, 1e-6)
    rotation.positions.zero_()

    def attend() -> Tensor:
        batch = triton_decode_attention.plan_decode(tables, seq_lens, caches.key_cache)
        fresh = qkv.clone()  # the launch that must come between
        return triton_decode_attention.decode_attention(
            fresh, rotation, caches.key_cache, caches.value_cache, batch, 0.1
        )

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    q, k = qkv.view(2, 32, 128)[:, :16], qkv.view(2, 32, 128)[:, 16:24]
    for lengths, order in (((3000, 700), (0, 1)), ((1, 0), (0, 1)), ((64, 2999), (1, 0)), ((700, 130), (1, 0))):
        seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        tables.copy_(caches.block_tables[list(order)])
        graph.replay()
        for row, (length, owner) in enumerate(zip(lengths, order, strict=True)):
            if length == 0:
                assert not out[row].any()
                continue
            keys = torch.cat([caches.keys[owner][: length - 1], k[row : row + 1]])
            values = torch.cat([caches.values[owner][: length - 1], v[row : row + 1]])
            assert_close(out[row : row + 1], causal_attention(q[row : row + 1], keys, values, 0.1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize(
    ("query_lens", "kv_lens"),
    [((513, 1, 128), (513, 1, 128)), ((300, 1, 64), (1000, 777, 64))],
    ids=["packed", "paged"],
)
def test_prefill_attention(
    query_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    checks.check_prefill_attention(query_lens, kv_lens, heads, kv_heads, head_dim, 16, dtype)


@pytest.mark.skipif(not flash_attention_3.usable(DEVICE), reason="no FlashAttention-3 for this GPU is installed")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (16, 8, 128), (28, 4, 128), (16, 4, 256)])
@pytest.mark.parametrize("block_size", [5, 16, 32, 256])
@pytest.mark.parametrize(
    ("query_lens", "kv_lens", "padding"),
    [
        ((513, 1, 128), (513, 1, 128), (0, 0)),
        ((300, 1, 64), (1000, 777, 64), (700, 100)),
        ((16, 7), (3000, 7), (41, 6)),
        ((0,), (0,), (600, 7)),
    ],
    ids=["packed", "paged", "few tokens", "nothing"],
)
def test_prefill_attention_by_flash_attention_3(
    query_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    padding: tuple[int, int],
    block_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    checks.check_prefill_attention(
        query_lens,
        kv_lens,
        heads,
        kv_heads,
        head_dim,
        block_size,
        dtype,
        padding=padding,
        attend=flash_attention_3.prefill_attention,
    )


def test_prefill_attention_in_a_batch_of_fixed_size() -> None:
    checks.check_prefill_attention((300, 1, 64), (1000, 777, 64), 16, 8, 128, 16, torch.bfloat16, padding=(700, 100))


def sampling_rows(
    batch: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[SamplingRows, Tensor]:
    """And positions."""
    rows = SamplingRows(
        torch.full((batch,), temperature, device=DEVICE),
        torch.full((batch,), top_k, dtype=torch.int32, device=DEVICE),
        torch.full((batch,), top_p, device=DEVICE),
        torch.full((batch,), min_p, device=DEVICE),
        torch.randint(-(2**63), 2**63 - 1, (batch,), generator=torch.Generator().manual_seed(3)).to(DEVICE),
    )
    return rows, torch.arange(batch, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.3, 2.0, 8.0])
@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.0, 0, 1.0, 0.0),
        (0.8, 0, 1.0, 0.0),
        (0.8, 50, 1.0, 0.0),
        (0.8, 5000, 1.0, 0.0),
        (0.8, 0, 0.9, 0.0),
        (0.8, 0, 0.999, 0.0),
        (0.8, 5000, 0.9, 0.0),
        (0.8, 40, 0.9, 0.02),
        (0.8, 0, 1.0, 0.1),
    ],
)
def test_sample(
    temperature: float, top_k: int, top_p: float, min_p: float, batch: int, spread: float, dtype: torch.dtype
) -> None:
    logits = randn(batch, VOCAB, seed=3).mul_(spread).to(dtype)
    rows, positions = sampling_rows(batch, temperature, top_k, top_p, min_p)
    together = checks.check_sample(logits, rows, positions)
    last = batch - 1
    alone = triton_sampling.sample(logits[last:], rows.select(lambda column: column[last:]), positions[last:])
    assert int(alone) == int(together[last])


def test_draws_follow_the_distribution() -> None:
    draws = 100_000
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]], device=DEVICE).expand(draws, 4).contiguous()
    taken = triton_sampling.sample(logits, *sampling_rows(draws, 1.0, 0, 1.0, 0.0)).long()
    shares = torch.bincount(taken, minlength=4).float() / draws
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.01)
