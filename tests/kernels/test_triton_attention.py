"""Paged decode attention, and prefill attention of packed chunks with and without cached context."""

import pytest
import torch

from kernels.fp8 import E4M3
from tests.kernels.inputs import DEVICE, require_dot

checks = pytest.importorskip("tests.kernels.checks", exc_type=ImportError)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS = [(9, 3, 64), (16, 8, 128), (4, 4, 80), (14, 2, 96), (8, 1, 256), (40, 2, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_decode_attention_head_shapes(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    require_dot(dtype)
    checks.check_decode_attention((70, 0, 1), heads, kv_heads, head_dim, 16, dtype, with_norm=heads % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS[:3])
def test_attention_with_8_bit_kv(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    require_dot(dtype)
    shape = (heads, kv_heads, head_dim, 16, dtype)
    checks.check_decode_attention((70, 0, 1, 300), *shape, with_norm=heads % 2 == 0, cache_dtype=E4M3)
    checks.check_prefill_attention((33, 20, 1), (33, 52, 40), *shape, cache_dtype=E4M3)


@pytest.mark.parametrize("block_size", [1, 5, 256])
@pytest.mark.parametrize("head_dim", [16, 32, 96, 256])
def test_attention_with_8_bit_kv_of_other_shapes(head_dim: int, block_size: int) -> None:
    shape = (4, 2, head_dim, block_size, torch.float16)
    checks.check_decode_attention((block_size + 1, 0, 90), *shape, cache_dtype=E4M3)
    checks.check_prefill_attention((3,), (90,), *shape, cache_dtype=E4M3)


@pytest.mark.parametrize("block_size", [1, 5, 16, 64, 256])
def test_decode_attention_block_sizes(block_size: int) -> None:
    checks.check_decode_attention((block_size, block_size + 1, 130), 4, 2, 64, block_size, torch.float32)


@pytest.mark.parametrize("lengths", [(300,), (64, 65, 128), (0, 0), (257, 3, 0, 0, 31, 32, 33, 1)])
def test_decode_attention_splits(lengths: tuple[int, ...]) -> None:
    checks.check_decode_attention(lengths, 6, 2, 64, 16, torch.float32)


def test_decode_attention_of_lengths_far_apart() -> None:
    checks.check_decode_attention((600, 1, 513, 1100, 0, 514), 4, 4, 64, 16, torch.float32)


def test_decode_attention_of_more_sequences_than_shares() -> None:
    checks.check_decode_attention((*range(1, 140, 7), 0, 900, 0, *range(140, 1, -7)), 4, 2, 64, 16, torch.float32)


def test_decode_attention_of_a_last_wave_that_is_cut() -> None:
    checks.check_decode_attention((*range(490, 498), 0, 500, 501, 0), 4, 2, 64, 16, torch.float32)


def test_decode_attention_without_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.triton_decode_attention, "_PROGRAMS_PER_SM", 0)  # one share, none to merge
    checks.check_decode_attention((300, 0, 5), 6, 2, 64, 16, torch.float32)


@pytest.mark.parametrize(
    "lengths",
    [
        (1,),
        (0,),
        (5000,),
        (600, 1, 513, 1100, 0, 514),
        (64,) * 20,
        (500,) * 4 + (0,) * 4,  # of a share and a half each
        (500,) * 4 + (620,),
        (700, 300, 600, 100),
        (*range(1, 400, 3), 0, 9000, 0),
        (*range(490, 498), 0, 500, 501, 0),  # two more than run at once
        (500,) * 8 + (0,) * 8,  # as many as run at once
        (500,) * 23,  # of the last wave there are more than shares
    ],
    ids=[
        "one token",
        "none",
        "long",
        "far apart",
        "equal",
        "equal, of more than a share",
        "almost equal",
        "uneven",
        "many",
        "two in the last wave",
        "one wave",
        "a last wave of many",
    ],
)
def test_decode_plan(lengths: tuple[int, ...]) -> None:
    checks.check_decode_plan(lengths, 2)


def test_decode_plan_of_a_long_sequence_among_many_equal_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone is cut, and not the last wave, too: there are not enough items for both."""
    monkeypatch.setattr(checks.triton_decode_attention, "multiprocessors", lambda _: 132)
    checks.check_decode_plan((1183, *(257,) * 659), 1)


def test_decode_plan_cuts_nothing_where_there_are_not_enough_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = checks.triton_decode_attention
    seq_lens = torch.tensor([300, 0, 5], dtype=torch.int32, device=DEVICE)
    key_cache = torch.empty(1, 16, 2, 64, device=DEVICE)

    def longest_piece(counters: int) -> int:
        monkeypatch.setattr(attention, "MAX_ARRIVALS", counters)
        plan = attention.plan_decode(seq_lens[:, None], seq_lens, key_cache).plan
        return int((plan[2] - plan[1])[plan[0] >= 0].max())

    needed = 2 * (3 + attention._shares(2, DEVICE))
    assert longest_piece(needed) < 299
    assert longest_piece(needed - 1) == 299
    checks.check_decode_attention((300, 0, 5), 6, 2, 64, 16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize(
    ("query_lens", "kv_lens"),
    [((33, 1), (33, 1)), ((20, 1, 5), (52, 40, 5))],
    ids=["packed", "paged"],
)
def test_prefill_attention_head_shapes(
    query_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    require_dot(dtype)
    checks.check_prefill_attention(query_lens, kv_lens, heads, kv_heads, head_dim, 16, dtype)


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
@pytest.mark.parametrize(
    ("query_lens", "kv_lens"),
    [((1,), (1,)), ((64,), (64,)), ((100, 31), (100, 31)), ((1,), (130,)), ((64, 7), (128, 71)), ((31, 40), (95, 40))],
)
def test_prefill_attention_lengths(query_lens: tuple[int, ...], kv_lens: tuple[int, ...], block_size: int) -> None:
    checks.check_prefill_attention(query_lens, kv_lens, 2, 1, 64, block_size, torch.float32)


@pytest.mark.parametrize("cache_dtype", [None, E4M3], ids=["same", "8-bit"])
@pytest.mark.parametrize(
    ("query_lens", "kv_lens", "padding"),
    [
        ((1,), (1500,), (0, 0)),
        ((70,), (1090,), (0, 0)),
        ((1, 33, 2), (512, 897, 800), (0, 0)),  # one, two and one part
        ((5, 20), (20, 1044), (9, 4)),
    ],
)
def test_prefill_attention_to_a_context_in_parts(
    query_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    padding: tuple[int, int],
    cache_dtype: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks.triton_prefill_attention, "multiprocessors", lambda _: 40)
    for heads, kv_heads, head_dim in ((6, 2, 64), (4, 4, 80)):
        shape = (heads, kv_heads, head_dim, 16, torch.float32)
        checks.check_prefill_attention(query_lens, kv_lens, *shape, padding=padding, cache_dtype=cache_dtype)
        assert not checks.triton_prefill_attention.arrivals(DEVICE).any(), "counters are left as they were found"


@pytest.mark.parametrize("padding", [(0, 5), (7, 1), (300, 40)])
@pytest.mark.parametrize(("query_lens", "kv_lens"), [((0,), (0,)), ((33,), (33,)), ((64, 1, 40), (64, 50, 75))])
def test_prefill_attention_in_a_batch_of_fixed_size(
    query_lens: tuple[int, ...], kv_lens: tuple[int, ...], padding: tuple[int, int]
) -> None:
    checks.check_prefill_attention(query_lens, kv_lens, 2, 1, 64, 16, torch.float32, padding=padding)
