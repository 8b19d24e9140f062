"""How the dispatcher shares the event loop with everything else."""

import asyncio
import gc
from typing import Any

import pytest

from router.cluster.circuit import Circuit
from router.cluster.worker import Worker
from router.config import RouterConfig
from router.dispatch import placement
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.request import Prompt, Request
from router.errors import InvalidArgument
from router.mailbox import Mailbox
from router.metrics import Metrics
from router.turnstile import Turnstile
from tests.router.fake_worker import DECODE, FakeWorker
from twostroke.v1 import inference_pb2, worker_pb2


def requests(count: int) -> list[Request]:
    prompt = Prompt(tuple(range(40)), 0, frozenset(), "")
    return [
        Request("", 0, number, prompt, worker_pb2.SamplingParams(), Mailbox(Turnstile()), 50) for number in range(count)
    ]


def connected(made: Dispatcher, **hello: Any) -> Worker:
    worker = Worker("", FakeWorker(DECODE, prefill_tokens=64, **hello).hello, Circuit())
    ready = inference_pb2.WorkerLoad(ready=True, blocks=inference_pb2.Blocks(free=1_000))
    made.received(worker, worker_pb2.WorkerMessage(load=ready))
    return worker


async def test_the_blocks_of_a_request_that_waits_are_hashed_in_the_turn_in_which_it_comes() -> None:
    """A search for one that need not wait would hash those of all that came since the last one."""
    made = Dispatcher(RouterConfig(), Metrics())
    connected(made, max_batch=1)
    asked = requests(3)
    for request in asked:
        made.submit([request])
    assert (made.running, made.queued) == (1, 2)
    assert [len(request.block_hashes) for request in asked] == [2, 2, 2]
    made.drop(asked)


async def test_a_request_that_does_not_fit_the_workers_that_come_is_not_held_by_its_failure() -> None:
    def too_long(_held_by_all: int | None) -> int:
        raise InvalidArgument("input", "is too long")

    made = Dispatcher(RouterConfig(), Metrics())
    asked = requests(1)
    asked[0].recheck_length = too_long
    made.submit(asked)
    gc.collect()
    gc.disable()
    try:
        connected(made)
        assert [request.failure for request in await asked[0].mailbox.take()]
        asked.clear()
        assert not any(isinstance(held, Request) for held in gc.get_objects())
    finally:
        gc.enable()


async def test_requests_that_are_sent_out_together_let_the_event_loop_turn_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With long prompts that takes milliseconds each, for which the tokens of all others would have to wait."""
    monkeypatch.setattr(placement, "SENDING_SECONDS", 0.0)
    made = Dispatcher(RouterConfig(), Metrics())
    worker = connected(made)
    asked = requests(6)
    made.submit(asked[:5])
    running = [made.running]
    for turn in range(6):
        if turn == 1:
            made.submit(asked[5:])  # it does not go faster for that
        await asyncio.sleep(0)
        running.append(made.running)
    assert running == [1, 2, 3, 4, 5, 6, 6]
    message = await worker.outbox.next_message()
    attempts = [worker.attempts[reserve.attempt_id].request for reserve in message.reserves]
    assert attempts == asked


async def test_requests_that_are_dropped_one_by_one_in_a_turn_are_not_begun_in_between() -> None:
    """As when a client with a thousand calls goes."""
    made = Dispatcher(RouterConfig(), Metrics())
    connected(made, max_batch=1)
    asked = requests(4)
    made.submit(asked)
    for request in asked[:3]:
        made.drop([request])
    await asyncio.sleep(0)
    assert [request.attempts for request in asked] == [1, 0, 0, 1]
    assert (made.running, made.queued) == (1, 0)
    made.drop(asked)
