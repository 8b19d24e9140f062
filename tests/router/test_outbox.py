import asyncio

from common.worker.message_size import FULL_BYTES, most_bytes
from router.cluster.outbox import Outbox, most_bytes_of
from twostroke.v1 import worker_pb2

LENGTH = 100_000


async def taken(outbox: Outbox, count: int) -> list[worker_pb2.RouterMessage]:
    async with asyncio.timeout(5):
        return [await outbox.next_message() for _ in range(count)]


async def test_what_waits_is_one_message() -> None:
    outbox = Outbox()
    for attempt_id in range(3):
        outbox.last(more=100).starts.add(attempt_id=attempt_id)
        outbox.last().ended.append(attempt_id)
    [message] = await taken(outbox, 1)
    assert [start.attempt_id for start in message.starts] == list(message.ended) == [0, 1, 2]
    outbox.last().ended.append(3)
    assert list((await taken(outbox, 1))[0].ended) == [3]


async def test_no_message_is_larger_than_workers_take_and_the_order_is_kept() -> None:
    """As after the loss of a worker, when all its long sequences go to another one."""
    sequence = worker_pb2.Sequence(
        token_ids=[2**32 - 1] * LENGTH, block_hashes=bytes(16 * LENGTH), grammar="x" * (2 << 20)
    )
    kv = worker_pb2.KvLocation(block_ids=[2**32 - 1] * LENGTH, generations=[2**64 - 1] * LENGTH)
    outbox = Outbox()
    for attempt_id in range(3):
        reserve = worker_pb2.Reserve(attempt_id=attempt_id, sequence=sequence)
        start = worker_pb2.Start(attempt_id=attempt_id, kv=kv)
        outbox.last(most_bytes_of(sequence)).reserves.append(reserve)
        outbox.last(start.ByteSize()).starts.append(start)
        outbox.last().ended.append(attempt_id)
    messages = await taken(outbox, 6)
    assert FULL_BYTES < max(message.ByteSize() for message in messages) <= most_bytes(LENGTH)
    said = [
        (kind, attempt_id)
        for message in messages
        for kind, ids in (
            ("reserve", [it.attempt_id for it in message.reserves]),
            ("start", [it.attempt_id for it in message.starts]),
            ("ended", message.ended),
        )
        for attempt_id in ids
    ]
    assert said == [(kind, attempt_id) for attempt_id in range(3) for kind in ("reserve", "start", "ended")]


def test_a_sequence_has_no_more_bytes_than_are_counted() -> None:
    most = 2**32 - 1
    sampling = worker_pb2.SamplingParams(
        temperature=1.5,
        top_k=most,
        top_p=0.5,
        min_p=0.5,
        repetition_penalty=2,
        presence_penalty=2,
        frequency_penalty=2,
        seed=2**64 - 1,
        logit_bias={most - place: 1.5 for place in range(1024)},
        logprobs=20,
    )
    sequence = worker_pb2.Sequence(
        token_ids=[most] * 1000,
        prompt_length=most,
        block_hashes=bytes(16 * 1000),
        sampling=sampling,
        max_length=most,
        min_length=most,
        stop_token_ids=[most] * 100,
        cache_root=bytes(16),
        request_id="é" * 64,
        grammar="🙂" * 100_000,
    )
    assert sequence.ByteSize() <= most_bytes_of(sequence) < 1.2 * sequence.ByteSize()
