"""Clusters in which everything happens and nothing goes wrong; and that the simulation finds what was broken for it."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from decode_worker import pulls
from decode_worker.scheduler import Scheduler as DecodeScheduler
from decode_worker.scheduler import Sequence, State
from prefill_worker.scheduler import Prompt
from prefill_worker.scheduler import Scheduler as PrefillScheduler
from router.cluster.worker import Worker
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.request import Attempt
from tests.simulation import model
from tests.simulation.model import Model
from tests.simulation.traffic import Traffic
from tests.simulation.world import run
from twostroke.v1 import worker_pb2 as pb

SEEDS = range(18, 21)  # together they have everything
HAPPENED = (
    "attempts draining",
    "attempts failed",
    "attempts lease_lost",
    "attempts preempted",
    "claims",
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
    "workers drained",
    "workers killed",
)

Break = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model.load(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def traffic(tiny: Model) -> Traffic:
    traffic = Traffic()
    for seed in SEEDS:
        run(seed, tiny, traffic)
    return traffic


def test_everything_happens_and_nothing_goes_wrong(traffic: Traffic) -> None:
    assert [what for what in HAPPENED if not traffic.counts[what]] == []


def test_the_same_seeds_give_the_same_in_every_process(traffic: Traffic) -> None:
    """Sets have another order there."""
    command = [sys.executable, "-m", "tests.simulation", "--seeds", f"{SEEDS[0]}:{SEEDS[-1]}"]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert traffic.digest in said


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
    ("broken", "seed", "sentence"),
    [
        (generations_are_not_compared, 1, "KV behind a hash"),
    ],
)
def test_what_is_broken_is_found(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, broken: Break, seed: int, sentence: str
) -> None:
    broken(monkeypatch)
    with pytest.raises((AssertionError, ValueError), match=sentence):
        run(seed, tiny, Traffic())
