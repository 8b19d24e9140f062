"""The messages of a shared call."""

import pytest

from router.many_message import DELTA_BYTES, EVENT_BYTES, MESSAGE_BYTES, Message
from twostroke.v1 import inference_pb2 as pb

Event = pb.GenerateManyResponse.Event


def test_deltas_are_columns_and_events_are_not() -> None:
    message = Message()
    message.add_delta(7, "one", [1])
    message.add_delta(9, "", ())
    message.add_chunk(8, lambda chunk: setattr(chunk.delta, "text", "four"))
    message.add_delta(3, "two three", [2, 3])
    assert not message.empty
    assert message.with_events == {8}
    made = pb.GenerateManyResponse.FromString(message.finished(draining=True).SerializeToString())
    assert made == pb.GenerateManyResponse(
        deltas=pb.GenerateManyResponse.Deltas(
            ids=[7, 9, 3], texts=["one", "", "two three"], token_counts=[1, 0, 2], token_ids=[1, 2, 3]
        ),
        events=[Event(id=8, chunk=pb.GenerateChunk(delta=pb.Delta(text="four")))],
        draining=True,
    )


def test_nothing_is_left_of_what_fails_to_be_written() -> None:
    def half(chunk: pb.GenerateChunk) -> None:
        chunk.delta.text = "half"
        raise RuntimeError

    message = Message()
    with pytest.raises(RuntimeError):
        message.add_chunk(1, half)
    assert message.empty
    assert message.with_events == set()
    assert message.finished(draining=False) == pb.GenerateManyResponse()


def test_other_calls_get_their_turn_after_so_many() -> None:
    end = [Event(id=1, end=pb.GenerateManyResponse.End())]
    for add, most in (
        (lambda message: message.add_delta(1, "word", [1]), MESSAGE_BYTES // DELTA_BYTES),
        (lambda message: message.say(1, end), MESSAGE_BYTES // EVENT_BYTES),
        (lambda message: message.add_chunk(1, lambda _: None), MESSAGE_BYTES // EVENT_BYTES),
    ):
        message = Message()
        for count in range(most):
            assert message.size < MESSAGE_BYTES, count
            add(message)
        assert message.size >= MESSAGE_BYTES


@pytest.mark.parametrize("text", ["a", "\U0001f600"])
def test_a_message_is_as_large_as_it_says_at_most(text: str) -> None:
    message = Message()
    while message.size < MESSAGE_BYTES:
        message.add_delta((1 << 63) + 1, text * 500, [(1 << 32) - 1] * 100)
    assert len(message.finished(draining=False).SerializeToString()) < 1.2 * message.size
