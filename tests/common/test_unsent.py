"""What a worker sends to a router that is slow to read."""

from collections.abc import Sequence

import pytest

from common.kv.cache_changes import FIELDS
from common.worker import unsent
from common.worker.unsent import MOST_JOINED, Unsent
from twostroke.v1 import inference_pb2
from twostroke.v1.worker_pb2 import CacheChanges, Ended, Logprobs, StepTokens, WorkerMessage

ONE, OTHER = b"1" * 16, b"2" * 16


def sent(*messages: WorkerMessage) -> list[WorkerMessage]:
    """What a router gets that reads nothing before all of these are there."""
    queue = Unsent(lambda: None)
    for message in messages:
        queue.put(message)
    return list(iter(queue.take, None))


def step(attempts: Sequence[int], tokens: Sequence[int], logprobs: Sequence[Logprobs] = ()) -> WorkerMessage:
    return WorkerMessage(tokens=StepTokens(attempt_ids=attempts, token_ids=tokens, logprobs=logprobs))


def told(field: str, changes: CacheChanges) -> WorkerMessage:
    message = WorkerMessage()
    getattr(message, field).CopyFrom(changes)
    return message


def large() -> WorkerMessage:
    return WorkerMessage(cache=CacheChanges(published=b"x" * 1_000))


def load(running: int) -> inference_pb2.WorkerLoad:
    return inference_pb2.WorkerLoad(running=running)


def test_steps_are_joined_in_their_order() -> None:
    (message,) = sent(step([1, 2], [10, 20]), step([2, 1], [21, 11]), step([1], [12]))
    assert message == step([1, 2, 2, 1, 1], [10, 20, 21, 11, 12])


def test_what_was_taken_at_once_is_sent_as_it_is() -> None:
    queue = Unsent(lambda: None)
    for token in range(3):
        queue.put(step([1], [token]))
        assert queue.take() == step([1], [token])
        assert queue.take() is None


def test_a_message_has_log_probabilities_for_all_tokens_or_for_none() -> None:
    some = Logprobs(logprob=-0.5, top_ids=[7], top_logprobs=[-0.5])
    messages = sent(step([1], [10]), step([1], [11], [some]), step([1, 2], [12, 20], [some, some]), step([2], [21]))
    assert messages == [step([1], [10]), step([1, 1, 2], [11, 12, 20], [some] * 3), step([2], [21])]
    (message,) = sent(WorkerMessage(ended=[Ended(attempt_id=3)]), step([1], [11], [some]))
    assert message.tokens.logprobs == [some]


def test_the_last_load_counts_and_has_everything_before_it_counted_in() -> None:
    """Zeros are not sent: merged field by field, an earlier load would show through."""
    first, last = WorkerMessage(load=load(5)), WorkerMessage(load=load(0))
    assert sent(first, last) == [last]
    assert sent(step([1], [10]), last) == [WorkerMessage(tokens=step([1], [10]).tokens, load=load(0))]
    first = WorkerMessage(load=load(5))
    assert sent(first, step([1], [10]), step([1], [11])) == [first, step([1, 1], [10, 11])]
    first_steps = WorkerMessage(tokens=step([1, 1], [10, 11]).tokens, load=load(0))
    messages = sent(step([1], [10]), WorkerMessage(load=load(5)), step([1], [11]), last, step([1], [12]))
    assert messages == [first_steps, step([1], [12])]


@pytest.mark.parametrize("field", FIELDS)
def test_of_what_happened_to_a_hash_the_last_counts(field: str) -> None:
    both, one = (told(field, CacheChanges(published=published)) for published in (ONE + OTHER, ONE))
    dropped = told(field, CacheChanges(dropped=ONE))
    assert sent(both, dropped) == [told(field, CacheChanges(published=OTHER, dropped=ONE))]
    assert sent(dropped, one) == [one]


def test_what_happened_in_the_pool_and_in_host_memory_stays_apart() -> None:
    in_pool, in_host = CacheChanges(published=ONE), CacheChanges(dropped=ONE)
    joined = WorkerMessage(cache=in_pool, host_cache=in_host)
    assert sent(WorkerMessage(host_cache=in_host), WorkerMessage(cache=in_pool)) == [joined]


@pytest.mark.parametrize("field", FIELDS)
def test_a_snapshot_of_the_cache_is_sent_alone(field: str) -> None:
    snapshot = told(field, CacheChanges(snapshot=True, published=ONE))
    change = told(field, CacheChanges(published=OTHER))
    assert sent(change, snapshot, change) == [change, snapshot, change]


def test_a_joined_message_does_not_grow_without_end() -> None:
    messages = sent(*(step([1], [token]) for token in range(2 * MOST_JOINED + 1)))
    assert [len(message.tokens.token_ids) for message in messages] == [MOST_JOINED, MOST_JOINED, 1]


@pytest.mark.parametrize(("most_messages", "most_bytes", "taken"), [(7, 1 << 30, 7), (1_000, 4_500, 6)])
def test_a_router_that_reads_nothing_is_cut_off_by_messages_and_by_bytes(
    monkeypatch: pytest.MonkeyPatch, most_messages: int, most_bytes: int, taken: int
) -> None:
    """Of messages of about 1,000 bytes, the first two are not measured."""
    monkeypatch.setattr(unsent, "MAX_UNSENT_MESSAGES", most_messages)
    monkeypatch.setattr(unsent, "MAX_UNSENT_BYTES", most_bytes)
    monkeypatch.setattr(unsent, "UNMEASURED_MESSAGES", 2)
    cut_off: list[None] = []
    queue = Unsent(lambda: cut_off.append(None))
    for _ in range(3):  # what was read does not count
        for _ in range(taken):
            queue.put(large())
        while queue.take() is not None:
            pass
    for _ in range(taken):
        queue.put(large())
    assert not cut_off
    queue.put(large())
    queue.put(large())
    assert len(cut_off) == 1
    assert queue.take() is None, "a router must not miss messages and then get others"
