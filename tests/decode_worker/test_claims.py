from types import SimpleNamespace

import pytest

from decode_worker import claims
from decode_worker.claims import CLAIM_SECONDS, Claims


def test_room_is_kept_for_who_has_waited_longest_from_all_others() -> None:
    made = Claims()
    assert made.kept_from(1) == 0
    made.set(1, 5)
    made.set(2, 9)
    assert [made.kept_from(connection) for connection in (1, 2, 3)] == [0, 5, 5]
    made.set(1, 7)  # it goes on waiting, for more
    assert [made.kept_from(connection) for connection in (1, 2, 3)] == [0, 7, 7]
    made.set(1, 0)
    made.set(1, 4)  # the next one of the same router has waited less
    assert [made.kept_from(connection) for connection in (1, 2, 3)] == [9, 0, 9]
    made.set(2, 0)
    made.set(1, 0)
    made.set(1, 0)
    assert made.kept_from(3) == 0


def test_a_claim_that_is_not_repeated_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its router hangs, with its connection open: the others must not wait for it."""
    now = 100.0
    monkeypatch.setattr(claims, "time", SimpleNamespace(monotonic=lambda: now))
    made = Claims()
    made.set(1, 5)
    made.set(2, 9)
    now += CLAIM_SECONDS - 1
    made.set(2, 8)
    assert made.kept_from(3) == 5
    now += 1
    assert [made.kept_from(connection) for connection in (1, 2, 3)] == [8, 0, 8]
    now += CLAIM_SECONDS
    assert made.kept_from(3) == 0
