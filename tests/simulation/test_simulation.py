"""Clusters in which everything happens and nothing goes wrong; and that the simulation finds what was broken for it."""

import os
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from common.kv.host_cache import HostCache, Load, _Save
from decode_worker import pulls
from decode_worker.batch import BatchState, DecodeBatch
from decode_worker.drafting import Drafting
from decode_worker.scheduler import Scheduler as DecodeScheduler
from decode_worker.scheduler import Sequence, State
from decode_worker.step import Stepper
from kernels import drafts
from kernels.drafts import DraftedRows
from prefill_worker.scheduler import Prompt
from prefill_worker.scheduler import Scheduler as PrefillScheduler
from router.cluster.worker import Worker
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.request import Attempt
from tests.simulation import model
from tests.simulation.__main__ import main
from tests.simulation.model import Model
from tests.simulation.traffic import Traffic
from tests.simulation.world import run
from twostroke.v1 import worker_pb2 as pb

FIRST = 2  # with the three seeds after it, it has everything
ENOUGH = 8  # seeds, should the code under test behave otherwise one day
HAPPENED = (
    "attempts draining",
    "attempts failed",
    "attempts lease_lost",
    "attempts preempted",
    "claims",
    "drafts kept",
    "loads",
    "pools unreadable",
    "prompts cached",
    "prompts in place",
    "requests dropped",
    "requests failed",
    "requests finished",
    "requests guided",
    "requests resumed",
    "requests turned away",
    "reservations refused",
    "streams cut",
    "streams settled",
    "workers drained",
    "workers killed",
)

WRONG_KV = "other KV behind a hash|a hash of tokens that nobody answers alone"  # the latter is what comes of it

Break = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model.load(tmp_path_factory.mktemp("tiny"))


def run_all(seeds: range, tiny: Model) -> Traffic:
    traffic = Traffic()
    for seed in seeds:
        run(seed, tiny, traffic)
    return traffic


def test_everything_happens_and_nothing_goes_wrong(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    traffic, observe = Traffic(), Drafting.observe

    def counted(drafting: Drafting, sequences: Items[Sequence], seconds: float, kept: Items[int] | None) -> None:
        traffic.counts["drafts kept"] += sum(kept or ())
        observe(drafting, sequences, seconds, kept)

    monkeypatch.setattr(Drafting, "observe", counted)
    for seed in range(FIRST, FIRST + ENOUGH):
        run(seed, tiny, traffic)
        missing = [what for what in HAPPENED if not traffic.counts[what]]
        if not missing:
            return
    pytest.fail(f"never happened: {missing}")


def test_a_seed_gives_the_same_run_in_every_process(tiny: Model) -> None:
    """Sets have another order there."""
    here = run_all(range(FIRST, FIRST + 1), tiny).digest
    assert run_all(range(FIRST, FIRST + 1), tiny).digest == here
    command = [sys.executable, "-m", "tests.simulation", "--seeds", f"{FIRST}:{FIRST}"]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert here in said


def generations_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pulls, "_checked", lambda _peer, pull: pulls._pulled(pull))


def prefill_releases_blocks_that_are_written(patch: pytest.MonkeyPatch) -> None:
    def release(scheduler: PrefillScheduler, prompt: Prompt) -> None:
        if prompt.attempt_id in scheduler._running:
            scheduler._leave(prompt)
            scheduler._blocks.release(prompt.blocks)

    patch.setattr(PrefillScheduler, "_release_if_idle", release)


def decode_releases_blocks_that_are_written(patch: pytest.MonkeyPatch) -> None:
    def release(scheduler: DecodeScheduler, sequence: Sequence) -> None:
        if sequence.state is State.OVER:
            blocks, sequence.blocks = sequence.blocks, []
            scheduler._blocks.release(blocks)

    patch.setattr(DecodeScheduler, "release_if_idle", release)


def hashes_are_published_with_the_reservation(patch: pytest.MonkeyPatch) -> None:
    reserve = DecodeScheduler.reserve

    def publish(scheduler: DecodeScheduler, sequence: Sequence, headroom: int, kept: int = 0) -> bool:
        admitted = reserve(scheduler, sequence, headroom, kept)
        for block, block_hash in zip(sequence.blocks, sequence.spec.block_hashes, strict=False):
            scheduler._blocks.publish(block, block_hash)
        return admitted

    patch.setattr(DecodeScheduler, "reserve", publish)


def host_memory_keeps_what_was_overwritten(patch: pytest.MonkeyPatch) -> None:
    def take(cache: HostCache, save: _Save) -> None:
        for slot, block_hash in zip(save.slots, save.blocks, strict=True):
            cache.slots.publish(slot, block_hash)
        cache.slots.release(save.slots)

    patch.setattr(HostCache, "_take", take)


def nobody_waits_for_host_memory(patch: pytest.MonkeyPatch) -> None:
    def arrived(load: Load) -> bool:
        load._books.release(load._slots)
        return True

    patch.setattr(Load, "arrived", arrived)


def drafts_are_kept_unseen(patch: pytest.MonkeyPatch) -> None:
    drafted = Stepper.drafted

    def accept(
        tokens: Tensor, lengths: Tensor, history: Tensor, rows: DraftedRows, drawn: Tensor, count: int
    ) -> Tensor:
        drawn[:-1] = torch.where(rows.owners[1:] == rows.owners[:-1], rows.tokens[1:], drawn[:-1])
        return drafts.accept(tokens, lengths, history, rows, drawn, count)

    def unseen(stepper: Stepper, state: BatchState, count: int) -> Tensor:
        return drafted(replace(stepper, ops=replace(stepper.ops, accept=accept)), state, count)

    patch.setattr(Stepper, "drafted", unseen)


def drafts_are_written_where_the_sequence_has_no_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DecodeBatch, "_limit", lambda _batch, sequence: sequence.spec.max_length - 1)


def first_tokens_come_twice(patch: pytest.MonkeyPatch) -> None:
    once = Dispatcher._prefilled

    def twice(dispatcher: Dispatcher, worker: Worker, attempt: Attempt, prefilled: pb.Prefilled) -> None:
        once(dispatcher, worker, attempt, prefilled)
        if not attempt.request.complete:
            attempt.request.add(prefilled.first_token)

    patch.setattr(Dispatcher, "_prefilled", twice)


def sequences_outlive_their_routers_stream(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DecodeScheduler, "of_connection", lambda _scheduler, _connection: [])


@pytest.mark.parametrize(
    ("broken", "first", "sentence"),
    [
        (generations_are_not_compared, 33, WRONG_KV),
        (prefill_releases_blocks_that_are_written, 2, "nobody holds it"),
        (decode_releases_blocks_that_are_written, 15, "another answer than alone|argument 2 is shorter"),
        (hashes_are_published_with_the_reservation, 1, WRONG_KV),
        (host_memory_keeps_what_was_overwritten, 2, WRONG_KV),
        (nobody_waits_for_host_memory, 2, WRONG_KV),
        (drafts_are_kept_unseen, 5, "another answer than alone|a hash of tokens that nobody answers alone"),
        (drafts_are_written_where_the_sequence_has_no_blocks, 18, WRONG_KV),
        (first_tokens_come_twice, 1, "another answer than alone"),
        (sequences_outlive_their_routers_stream, 5, "no end to the work of decode"),
    ],
)
def test_what_is_broken_is_found(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, broken: Break, first: int, sentence: str
) -> None:
    """By the first seed, or the few after it should the code under test behave otherwise one day."""
    broken(monkeypatch)
    with pytest.raises((AssertionError, ValueError), match=sentence):
        run_all(range(first, first + ENOUGH), tiny)


def test_the_command_says_which_seed_found_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first_tokens_come_twice(monkeypatch)
    assert main(seeds="1:2") == 1
    said = capsys.readouterr()
    assert "seed 1: AssertionError: " in said.out
    assert "Traceback" in said.err
