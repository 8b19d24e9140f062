"""What a router may not send, to both kinds of worker: the engine goes on, every block comes home when the router goes,
and the next prompt has the tokens that it would have had."""

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.in_process import spec
from benchmarks.parts import LoadedModel, worker_parts
from common.worker.worker_service import Received
from tests.messages import Path as FieldPath
from tests.messages import fuzz, messages, paths, values
from tests.one_prefill_worker import OnePrefillWorker
from tests.one_worker import ROUTER, OneWorker, load_tiny
from tests.specs import sequence_to_proto
from twostroke.v1 import worker_pb2 as pb

MESSAGE = pb.RouterMessage.DESCRIPTOR
FIELDS = [path for path in paths(MESSAGE) if path.names[0] != "hello"]
EXAMPLES = [10, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
BLOCK = 4
PROMPT = list(range(40, 50))
TURNS = 6


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def send_to_decode(loaded: LoadedModel) -> Callable[[list[pb.RouterMessage]], None]:
    one = OneWorker(worker_parts(loaded, 40, BLOCK), max_batch=8)
    asked = [spec(PROMPT, 20, temperature=0, block_size=BLOCK)]
    wanted = one.run(asked)

    def send(sent: list[pb.RouterMessage]) -> None:
        one._wire.to_worker += [Received(ROUTER, message) for message in sent]
        for _ in range(TURNS):
            one._engine.turn(draining=False)
        one.router_gone()
        while one._wire.to_worker or not one._engine._idle:
            one._engine.turn(draining=False)
        one._wire.flush()
        one._wire.to_router.clear()
        assert one.run(asked) == wanted

    return send


@pytest.fixture(scope="module")
def send_to_prefill(loaded: LoadedModel) -> Callable[[list[pb.RouterMessage]], None]:
    one = OnePrefillWorker(worker_parts(loaded, 40, BLOCK), max_batch_tokens=16)

    def first_token() -> int:
        one.send(pb.RouterMessage(prefills=[prefill(99)]))
        (prefilled,) = [prefilled for _ in range(TURNS) for prefilled in one.turn().prefilled]
        one.send(pb.RouterMessage(ended=[99]))
        one.turn()
        assert one.idle
        assert one.parts.blocks.in_use_count == 0
        return prefilled.first_token

    wanted = first_token()

    def send(sent: list[pb.RouterMessage]) -> None:
        one.send(*sent)
        for _ in range(TURNS):
            one.turn()
        one.send(None)
        while not one.idle:
            one.turn()
        assert first_token() == wanted

    return send


def sequence() -> pb.Sequence:
    return sequence_to_proto(spec(PROMPT, 20, temperature=1, block_size=BLOCK))


def prefill(attempt: int) -> pb.Prefill:
    return pb.Prefill(attempt_id=attempt, sequence=sequence())


def valid() -> pb.RouterMessage:
    """A message with something of each kind in it."""
    reserves = [
        pb.Reserve(attempt_id=2, sequence=sequence(), headroom_tokens=4, prefill=True),
        pb.Reserve(attempt_id=3, sequence=sequence(), headroom_tokens=4),
    ]
    pool = pb.PoolHandle(instance="gone", transport="shm", descriptor=b"{}")
    start = pb.Start(attempt_id=3, first_token=7, kv=pb.KvLocation(pool=pool, block_ids=[0, 1, 2], generations=[0] * 3))
    return pb.RouterMessage(prefills=[prefill(1), prefill(4)], reserves=reserves, starts=[start], pools=[pool])


def plausible(field: FieldDescriptor) -> st.SearchStrategy[Any] | None:
    if field.name == "attempt_id":
        return st.integers(1, 4)
    if field.containing_type is pb.Sequence.DESCRIPTOR and field.name == "token_ids":
        return st.integers(0, 599)
    if field.name == "max_length":
        return st.integers(4, 64)
    return None


@pytest.mark.parametrize("field", ["block_ids", "generations"])
def test_a_hand_over_that_contradicts_itself_is_not_the_requests_fault(loaded: LoadedModel, field: str) -> None:
    """A worker's, or the router's: it may be resumed, and is not refused."""
    one = OneWorker(worker_parts(loaded, 40, BLOCK))
    attempt = one.ask(spec(PROMPT, 20, temperature=0, block_size=BLOCK), prefills=False)
    (start,) = valid().starts
    start.attempt_id = attempt
    del getattr(start.kv, field)[-1]
    one._wire.to_worker.append(Received(ROUTER, pb.RouterMessage(starts=[start])))
    one.finish()
    assert one.ended == {attempt: pb.Ended.CAUSE_FAILED}


@pytest.mark.parametrize("path", FIELDS, ids=[str(path) for path in FIELDS])
def test_any_value_of_a_field(
    send_to_decode: Callable[[list[pb.RouterMessage]], None],
    send_to_prefill: Callable[[list[pb.RouterMessage]], None],
    path: FieldPath,
) -> None:
    @fuzz(2)
    @given(values(path.field, plausible), st.booleans())
    def one_field(value: Any, twice: bool) -> None:
        message = valid()
        path.put(message, value)
        sent = [message, valid()] if twice else [message]
        if path.names[0] != "prefills":
            send_to_decode(sent)
        if path.names[0] not in ("reserves", "starts"):
            send_to_prefill(sent)

    one_field()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_messages(
    send_to_decode: Callable[[list[pb.RouterMessage]], None],
    send_to_prefill: Callable[[list[pb.RouterMessage]], None],
    examples: int,
) -> None:
    @fuzz(examples)
    @given(st.lists(messages(MESSAGE, plausible) | st.builds(valid), max_size=4))
    def any_messages(sent: list[pb.RouterMessage]) -> None:
        send_to_decode(sent)
        send_to_prefill(sent)

    any_messages()
