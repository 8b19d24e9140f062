"""What a key may use, by a clock of the test's own."""

import time
from collections.abc import Callable

import grpc
import pytest

from router.callers.limits import Caller, Limits
from router.errors import CallError, InvalidArgument


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(CallError) as refused:
        call()
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    return refused.value.message


def generate(caller: Caller, choices: int = 1, tokens: int = 0) -> None:
    with caller.generating(choices):
        caller.spend(tokens)


def test_requests_per_minute(wait: Callable[[float], None]) -> None:
    caller = Caller("alice", limits=Limits(requests_per_minute=30))
    for _ in range(30):
        caller.call()
    assert refusal(caller.call) == "'alice' may make 30 requests per minute; try again in 2.0 s"
    wait(1.9)
    assert refusal(caller.call).endswith("try again in 0.1 s")
    wait(0.1)
    caller.call()
    refusal(caller.call)
    wait(3600)  # saves up a minute's worth, and no more
    for _ in range(30):
        caller.call()
    refusal(caller.call)


def test_concurrent_requests_count_choices() -> None:
    caller = Caller("alice", limits=Limits(concurrent_requests=3))
    with caller.generating(2):
        assert refusal(lambda: generate(caller, 2)) == (
            "'alice' may have 3 concurrent requests, and has 2; this one counts as 2; try again later"
        )
        with caller.generating(1):
            assert "and has 3; try again later" in refusal(lambda: generate(caller))
    with pytest.raises(ZeroDivisionError), caller.generating(3):
        raise ZeroDivisionError
    generate(caller, 3)


def test_more_choices_than_a_caller_ever_has_are_refused_for_good() -> None:
    with pytest.raises(InvalidArgument, match="n: 4 answers are more than the 3 that 'alice' may have at once"):
        generate(Caller("alice", limits=Limits(concurrent_requests=3)), 4)


def test_tokens_per_minute_are_paid_back(wait: Callable[[float], None]) -> None:
    caller = Caller("alice", limits=Limits(tokens_per_minute=600))
    generate(caller, tokens=599)
    generate(caller, tokens=301)  # one was left; what an answer takes is known only afterwards
    assert refusal(lambda: generate(caller)) == "'alice' may use 600 tokens per minute; try again in 30.1 s"
    wait(30)
    refusal(lambda: generate(caller))
    wait(0.1)
    generate(caller)
    wait(3600)
    generate(caller, tokens=600)  # spent now: the hour before pays for nothing
    refusal(lambda: generate(caller))


def test_without_limits_nothing_is_refused() -> None:
    caller = Caller("alice")
    for _ in range(1000):
        caller.call()
        generate(caller, 16, 10**6)


def test_salts_of_different_groups_never_meet() -> None:
    pairs = [("a", ""), ("a", "b"), ("ab", ""), ("", "a"), ("a", "\0b"), ("b", "a")]
    salts = {Caller("caller", cache_group=group).cache_salt(salt) for group, salt in pairs}
    assert len(salts) == len(pairs)
    assert Caller("everyone").cache_salt("mine") == "mine"
