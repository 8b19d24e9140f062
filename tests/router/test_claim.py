"""What the first request in a router's queue claims for itself, and from which decode worker."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from router.cluster.worker import Worker
from router.dispatch import claim
from router.dispatch.claim import Claim
from router.dispatch.request import Attempt, Request
from tests.router.cluster import cluster, eventually, request
from tests.router.fake_worker import DECODE, FakeWorker, Script
from tests.router.test_choose import BLOCK, worker
from tests.router.test_choose import request as new_request

TOKENS = 9 * BLOCK


@pytest.fixture(autouse=True)
def at_once_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "PATIENCE", 0.0)
    monkeypatch.setattr(claim, "REPEATED", 600.0)


async def claimed(worker: Worker) -> list[int]:
    """What the worker was told since the last call."""
    told: list[int] = []
    while worker.outbox._has_messages.is_set():
        message = await worker.outbox.next_message()
        told += [message.claimed_blocks] if message.HasField("claimed_blocks") else []
    return told


def waits(made: Claim, request: Request, workers: Sequence[Worker]) -> None:
    made.first_is(request)
    made.no_room_for(request, TOKENS, workers)


async def test_room_is_claimed_once_where_there_is_most_until_another_request_is_the_first() -> None:
    small, roomy = worker(DECODE, free=3), worker(DECODE, free=8)
    made, first, second = Claim(), new_request(), new_request()
    waits(made, first, [small, roomy])
    small.take_load(roomy.load)
    waits(made, first, [small, roomy])
    made.no_room_for(second, TOKENS, [small, roomy])  # it waits behind the first
    assert (await claimed(small), await claimed(roomy)) == ([], [9])
    made.first_is(second)
    assert (await claimed(small), await claimed(roomy)) == ([], [0])
    waits(made, second, [small])
    made.first_is(None)
    assert (await claimed(small), await claimed(roomy)) == ([0], [])


async def test_a_claim_is_repeated_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "REPEATED", 0.0)
    asked, other = worker(DECODE, free=8), worker(DECODE, free=3)
    made, first = Claim(), new_request()
    for _ in range(3):
        waits(made, first, [asked, other])
        asked.take_load(other.load)
        assert (await claimed(asked), await claimed(other)) == ([9], [])


async def test_who_has_not_been_the_first_for_long_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "PATIENCE", 60.0)
    asked = worker(DECODE)
    waits(Claim(), new_request(), [asked])
    assert await claimed(asked) == []


async def test_a_claim_goes_elsewhere_if_its_worker_leaves() -> None:
    leaves, stays, too_small = worker(DECODE, free=8), worker(DECODE, free=3), worker(DECODE, max_length=TOKENS - 1)
    made, first = Claim(), new_request(max_length=TOKENS)
    waits(made, first, [leaves, stays, too_small])
    waits(made, first, [stays, too_small])
    assert (await claimed(leaves), await claimed(stays), await claimed(too_small)) == ([0], [9], [])


async def test_a_claim_is_kept_until_the_worker_has_answered_the_request() -> None:
    """It may refuse it, because another router's sequence has grown meanwhile."""
    asked = worker(DECODE)
    made, first, second = Claim(), new_request(), new_request()
    waits(made, first, [asked])
    assert await claimed(asked) == [9]
    first.attempt = Attempt(1, first, None, asked, 1, 9, in_place=False, length=first.length)
    waits(made, second, [asked])
    assert await claimed(asked) == []
    first.attempt.reserved = True
    made.first_is(second)
    assert await claimed(asked) == [0]


async def test_a_request_that_waits_for_room_claims_it_for_as_long_as_it_waits(model: Path) -> None:
    busy = FakeWorker(DECODE, Script(stop_after=3), num_blocks=4, max_length=64)
    async with cluster(model, decodes=[busy]) as it:
        calls = [it.stub.Generate(request(max_tokens=20), timeout=30) for _ in range(3)]  # each needs 3 blocks
        await eventually(lambda: busy.claims == [3])
        for call in calls[1:]:
            call.cancel()
        await eventually(lambda: busy.claims[-1] == 0)
        assert it.router.dispatcher.queued == 0
        calls += [it.stub.Generate(request(max_tokens=20), timeout=30) for _ in range(3)]
        await eventually(lambda: busy.claims[-1] == 3)
        busy.script.stop_after = None
        await asyncio.gather(calls[0], *calls[3:])
        await eventually(lambda: busy.claims[-1] == 0)


async def test_where_a_request_can_no_longer_go_it_claims_nothing(model: Path) -> None:
    busy = FakeWorker(DECODE, Script(stop_after=3), num_blocks=4, max_length=64)
    async with cluster(model, decodes=[busy]) as it:
        calls = [it.stub.Generate(request(max_tokens=20), timeout=30) for _ in range(2)]
        await eventually(lambda: busy.claims == [3])
        it.prefills[0].ready = False  # nobody else computes prompts
        it.prefills[0].report()
        await eventually(lambda: busy.claims == [3, 0])
        for call in calls:
            call.cancel()
