from hypothesis import given
from hypothesis import strategies as st

from router.dispatch.request import Prompt, Request
from router.dispatch.waiting_queue import WaitingQueue
from router.mailbox import Mailbox
from router.turnstile import Turnstile
from twostroke.v1 import worker_pb2

PROMPT = Prompt((1,), 1, frozenset(), "")


def new(serial: int, resumes: int = 0) -> Request:
    made: Request = Request("", 0, serial, PROMPT, worker_pb2.SamplingParams(), Mailbox(Turnstile()), 2)
    made.resumes = resumes
    return made


def test_resumed_requests_come_first_and_each_kind_in_order_of_arrival() -> None:
    queue = WaitingQueue()
    for serial, resumes in ((3, 0), (1, 0), (5, 2), (4, 1), (2, 0)):
        queue.push(new(serial, resumes))
    waiting = [queue.at(place) for place in range(6)]
    assert [request and request.serial for request in waiting] == [4, 5, 1, 2, 3, None]


@given(st.lists(st.integers(0, 20), max_size=100))
def test_whoever_leaves_from_whatever_place_is_gone_and_the_rest_stays_in_order(steps: list[int]) -> None:
    """0 pushes, N takes the request out that is N-th from the front."""
    queue = WaitingQueue()
    waiting: list[Request] = []
    for serial, step in enumerate(steps):
        if step == 0:
            waiting.append(new(serial))
            queue.push(waiting[-1])
        elif step <= len(waiting):
            queue.remove(waiting.pop(step - 1))
        assert len(queue) == queue.prompt_tokens == len(waiting)
        assert [queue.at(place) for place in range(len(waiting) + 1)] == [*waiting, None]
    assert queue.clear() == waiting
    assert queue.at(0) is None
    assert queue.prompt_tokens == 0
