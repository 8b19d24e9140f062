"""What a decode worker makes of a router's messages."""

from typing import cast

import pytest

from benchmarks.in_process import spec
from benchmarks.parts import LoadedModel, worker_parts
from common.sequence import SequenceSpec
from common.worker.lifecycle import Lifecycle
from common.worker.worker_service import Received
from decode_worker.pulls import Pulled
from tests.one_worker import ROUTER, OneWorker, load_tiny
from tests.specs import sequence_to_proto
from twostroke.v1 import worker_pb2 as pb

BLOCK = 4


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("tiny"))


def sequence(first_token: int) -> SequenceSpec:
    return spec(range(first_token, first_token + 10), 40, temperature=0, block_size=BLOCK)


@pytest.mark.parametrize(("blocks", "max_batch"), [(40, 1), (11, 8)], ids=["full batch", "full pool"])
def test_room_of_an_attempt_that_ended_goes_to_one_of_the_same_message(
    loaded: LoadedModel, blocks: int, max_batch: int
) -> None:
    """As when a client cancels while others wait: a router packs both into one message."""
    one = OneWorker(worker_parts(loaded, blocks, BLOCK), max_batch=max_batch)
    first = one.ask(sequence(40))
    one.turn()
    second = one.ask(sequence(80))
    message = one._wire.to_worker[-1].message
    assert message is not None
    message.ended.append(first)
    one.finish()
    assert one.refused == set()
    assert one.ended == {second: pb.Ended.CAUSE_FINISHED}


def test_an_attempt_that_its_own_message_ends_leaves_nothing(loaded: LoadedModel) -> None:
    one = OneWorker(worker_parts(loaded, 40, BLOCK))
    reserve = pb.Reserve(attempt_id=1, sequence=sequence_to_proto(sequence(40)), headroom_tokens=4)
    one._wire.to_worker.append(Received(ROUTER, pb.RouterMessage(reserves=[reserve], ended=[1])))
    one.turn()
    assert one.scheduler.get(1) is None
    assert one.parts.blocks.in_use_count == 0


def test_a_router_hears_what_begins_before_the_step_that_it_begins_with(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a step takes long: a hand-over would wait for it, and its time would be missing from the decode's."""
    one = OneWorker(worker_parts(loaded, 40, BLOCK))
    one.ask(sequence(40))
    one.turn()

    def messages_of_turn() -> list[pb.WorkerMessage]:
        one._engine.turn(draining=False)
        one._wire.flush()
        messages, one._wire.to_router = one._wire.to_router, []
        return [message for message in messages if message.ByteSize()]

    attempt = one.ask(sequence(80), prefills=False)
    before, after = messages_of_turn()
    assert [reserved.attempt_id for reserved in before.reserved] == [attempt]
    assert after.HasField("tokens")
    one.sequence(attempt).tokens.append(7)
    pulled = [Pulled(one.sequence(attempt), milliseconds=1.5)]
    monkeypatch.setattr(one._engine._puller, "poll", lambda: [pulled.pop()] if pulled else [])
    before, after = messages_of_turn()
    assert [started.attempt_id for started in before.started] == [attempt]
    assert attempt in after.tokens.attempt_ids


class Failing:
    """What tells an engine whether to go on, and fails instead."""

    draining = False

    def over(self, idle: bool) -> bool:
        raise RuntimeError("an error of the engine's loop")


def test_an_engine_that_fails_closes_its_peers_pools(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits for one of them would keep the process from ending."""
    one = OneWorker(worker_parts(loaded, 40, BLOCK))
    closed: list[bool] = []
    monkeypatch.setattr(one._engine._peers, "close", lambda: closed.append(True))
    with pytest.raises(RuntimeError, match="of the engine's loop"):
        one._engine.run(cast(Lifecycle, Failing()))
    assert closed == [True]
