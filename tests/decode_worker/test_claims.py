from decode_worker.claims import Claims


def test_room_is_kept_for_who_has_waited_longest_from_all_others() -> None:
    claims = Claims()
    assert claims.kept_from(1) == 0
    claims.set(1, 5)
    claims.set(2, 9)
    assert [claims.kept_from(connection) for connection in (1, 2, 3)] == [0, 5, 5]
    claims.set(1, 7)  # it goes on waiting, for more
    assert [claims.kept_from(connection) for connection in (1, 2, 3)] == [0, 7, 7]
    claims.set(1, 0)
    claims.set(1, 4)  # the next one of the same router has waited less
    assert [claims.kept_from(connection) for connection in (1, 2, 3)] == [9, 0, 9]
    claims.set(2, 0)
    claims.set(1, 0)
    claims.set(1, 0)
    assert claims.kept_from(3) == 0
