"""What the prefill worker's engine takes, and what it answers where it takes nothing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.in_process import spec
from benchmarks.parts import worker_parts
from common.kv.host_cache import HostCache
from prefill_worker import engine
from tests.one_prefill_worker import OnePrefillWorker
from tests.one_worker import load_tiny
from tests.specs import sequence_to_proto
from twostroke.v1 import worker_pb2 as pb

BLOCK = 4


def prefill(attempt: int) -> pb.Prefill:
    prompt = spec([40 + attempt] * 10, 20, temperature=0, block_size=BLOCK)
    return pb.Prefill(attempt_id=attempt, sequence=sequence_to_proto(prompt), uncached_tokens=attempt)


@pytest.fixture
def one(tmp_path: Path) -> OnePrefillWorker:
    return OnePrefillWorker(worker_parts(load_tiny(tmp_path), 40, BLOCK), max_batch_tokens=16)


def test_what_a_message_ends_has_left_its_place_to_what_it_brings(
    one: OnePrefillWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MAX_WAITING", 1)
    both_and_over = pb.RouterMessage(ended=[2, 3], prefills=[prefill(3)])
    one.send(pb.RouterMessage(prefills=[prefill(1)]), pb.RouterMessage(ended=[1], prefills=[prefill(2)]), both_and_over)
    one.send(pb.RouterMessage(prefills=[prefill(4)]))
    said = one.turn()
    said.MergeFrom(one.turn())
    assert not said.ended
    assert [prefilled.attempt_id for prefilled in said.prefilled] == [4]


def test_prompts_beyond_what_may_wait_are_answered_so(one: OnePrefillWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_WAITING", 2)

    def ask(*attempts: int) -> pb.WorkerMessage:
        """What the worker says in the turns that it takes to compute them."""
        one.send(pb.RouterMessage(prefills=map(prefill, attempts)))
        said = pb.WorkerMessage()
        for _ in range(4):
            said.MergeFrom(one.turn())
        return said

    said = ask(1, 2, 3, 4, 5)
    assert [prefilled.attempt_id for prefilled in said.prefilled] == [1, 2]
    assert [(ended.attempt_id, ended.cause) for ended in said.ended] == [
        (attempt, pb.Ended.CAUSE_FULL) for attempt in (3, 4, 5)
    ]
    assert [prefilled.attempt_id for prefilled in ask(6).prefilled] == [6]
    one.send(None)
    one.turn()
    assert one.parts.blocks.in_use_count == 0


def test_a_sequence_may_become_longer_than_any_that_this_worker_holds(one: OnePrefillWorker) -> None:
    asked = prefill(1)
    asked.sequence.max_length = asked.sequence.min_length = 2**32 - 1
    asked.sequence.stop_token_ids.append(7)
    one.send(pb.RouterMessage(prefills=[asked]))
    assert [prefilled.attempt_id for prefilled in one.turn().prefilled] == [1]


class AtOnce:
    """Host memory that copies nothing, in no time."""

    num_blocks = 10

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> "AtOnce":
        return self

    def load(self, slots: Sequence[int], blocks: Sequence[int]) -> "AtOnce":
        raise NotImplementedError

    def done(self) -> bool:
        return True

    def close(self) -> None:
        pass


def test_what_has_been_copied_counts_though_its_block_is_given_away_next(tmp_path: Path) -> None:
    parts = worker_parts(load_tiny(tmp_path), 3, BLOCK)  # as many as a prompt takes
    cache = HostCache(parts.blocks, AtOnce())
    one = OnePrefillWorker(replace(parts, host_cache=cache), max_batch_tokens=16)
    for attempt in (1, 2, 3):
        one.send(pb.RouterMessage(ended=[attempt - 1], prefills=[prefill(attempt)]))
        assert [prefilled.attempt_id for prefilled in one.turn().prefilled] == [attempt]
    for attempt in (1, 2):
        hashes = spec([40 + attempt] * 10, 20, temperature=0, block_size=BLOCK).block_hashes
        assert [cache.finds(block_hash) for block_hash in hashes] == [True, True]


def test_what_is_to_be_computed_counts_until_it_is_complete_or_dropped(one: OnePrefillWorker) -> None:
    one.send(pb.RouterMessage(prefills=[prefill(attempt) for attempt in (1, 2, 4, 8, 16)]))
    pending = []
    for ended in ([], [4], []):
        one.send(pb.RouterMessage(ended=ended))
        one.turn()
        pending.append(one.pending_tokens)
    assert pending == [2 + 4 + 8 + 16, 16, 0], "of ten tokens each, 16 are computed in a turn"
