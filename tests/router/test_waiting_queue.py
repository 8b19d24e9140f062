from hypothesis import given
from hypothesis import strategies as st

from router.mailbox import Mailbox
from router.request import Prompt, Request, State
from router.turnstile import Turnstile
from router.waiting_queue import WaitingQueue
from twostroke.v1 import worker_pb2

PROMPT = Prompt((1,), 2, 1, frozenset(), "")


def new(serial: int, resumes: int = 0) -> Request:
    made: Request = Request("", 0, serial, PROMPT, worker_pb2.SamplingParams(), Mailbox(Turnstile()))
    made.resumes = resumes
    return made


def test_resumed_requests_come_first_and_each_kind_in_order_of_arrival() -> None:
    queue = WaitingQueue()
    for serial, resumes in ((3, 0), (1, 0), (5, 2), (4, 1), (2, 0)):
        queue.push(new(serial, resumes))
    assert queue.first() is not None
    assert [queue.pop().serial for _ in range(5)] == [4, 5, 1, 2, 3]
    assert queue.first() is None


@given(st.lists(st.sampled_from(["push", "pop", "drop"]), max_size=300))
def test_it_counts_what_waits_and_keeps_little_else(steps: list[str]) -> None:
    queue = WaitingQueue()
    waiting: list[Request] = []
    for serial, step in enumerate(steps):
        if step == "push":
            waiting.append(new(serial))
            queue.push(waiting[-1])
        elif waiting and step == "pop":
            assert queue.first() is waiting[0]
            assert queue.pop() is waiting.pop(0)
        elif waiting:
            waiting.pop().state = State.DROPPED
            queue.dropped()
        assert len(queue) == len(waiting)
        assert queue.first() is (waiting[0] if waiting else None)
        assert len(queue._heap) <= 2 * len(queue) + 65
    assert queue.clear() == waiting
