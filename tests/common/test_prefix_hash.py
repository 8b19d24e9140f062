import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from common.kv.prefix_hash import HASH_BYTES, block_hashes, cache_root, extend

ROOT = cache_root("model", "")
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=70)


@given(tokens, st.integers(1, 20))
def test_blocks_at_once_equal_blocks_one_by_one(tokens: list[int], block_size: int) -> None:
    expected = []
    parent = ROOT
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = extend(parent, tokens[start : start + block_size])
        expected.append(parent)
    assert block_hashes(ROOT, tokens, block_size) == expected
    assert block_hashes(ROOT, tuple(tokens), block_size) == expected


@given(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=40), st.data())
def test_hashes_agree_exactly_as_far_as_the_tokens_do(tokens: list[int], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(tokens) - 1))
    changed = list(tokens)
    changed[position] ^= 1 << data.draw(st.integers(0, 31))
    before, after = block_hashes(ROOT, tokens, 4), block_hashes(ROOT, changed, 4)
    same = position // 4
    assert before[:same] == after[:same]
    assert not set(before[same:]) & set(after[same:])


def test_the_same_block_at_another_place_has_another_hash() -> None:
    hashes = block_hashes(ROOT, [7] * 64, 16)
    assert len(set(hashes)) == 4


def test_roots_keep_models_and_tenants_apart() -> None:
    roots = [
        cache_root("a", "b"),
        cache_root("ab", ""),
        cache_root("", "ab"),
        cache_root("a", "c"),
        cache_root("b", "b"),
    ]
    assert len(set(roots)) == len(roots)
    assert {len(root) for root in roots} == {HASH_BYTES}
    chains = [block_hashes(root, range(16), 4) for root in roots]
    assert len({name for chain in chains for name in chain}) == 4 * len(roots)


def test_hashes_do_not_depend_on_the_process() -> None:
    code = "from common.kv.prefix_hash import *; print(block_hashes(cache_root('m', 's'), range(40), 16)[-1].hex())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {block_hashes(cache_root("m", "s"), range(40), 16)[-1].hex()}


def test_short_sequences_have_no_full_block() -> None:
    assert block_hashes(ROOT, [], 16) == []
    assert block_hashes(ROOT, [1] * 15, 16) == []
