from hypothesis import given
from hypothesis import strategies as st

from common.kv import cache_changes
from common.kv.prefix_hash import HASH_BYTES
from router.cluster.prefix_index import PrefixIndex
from twostroke.v1 import worker_pb2

HASHES = st.integers(0, 7).map(lambda number: bytes([number]) * HASH_BYTES)
CHANGES = st.dictionaries(HASHES, st.booleans()).map(cache_changes.pack)


@given(st.lists(HASHES), st.lists(CHANGES, min_size=1))
def test_joined_changes_do_what_they_do_one_after_the_other(
    before: list[bytes], changes: list[worker_pb2.CacheChanges]
) -> None:
    one_by_one, at_once = PrefixIndex(), PrefixIndex()
    for index in (one_by_one, at_once):
        index.published.update(before)
    noted: dict[bytes, bool] = {}
    for change in changes:
        one_by_one.apply(change)
        cache_changes.note(noted, change)
    joined = cache_changes.pack(noted)
    at_once.apply(joined)
    assert at_once.published == one_by_one.published
    published, dropped = set(cache_changes.unpack(joined.published)), set(cache_changes.unpack(joined.dropped))
    assert published.isdisjoint(dropped)
