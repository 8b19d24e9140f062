"""A decode worker that prefills: both engines on one pool, with a real model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.in_process import spec
from benchmarks.parts import LoadedModel, worker_parts
from common.kv import host_memory
from common.kv.block_pool import BlockPool
from common.kv.host_cache import HostCache
from common.kv.host_memory import ThreadCopy
from common.sequence import SequenceSpec
from decode_worker.loop import DecodeLoop
from decode_worker.scheduler import State
from kernels.ops import REFERENCE
from prefill_worker.loop import LOAD_POLL_SECONDS
from tests.common import hf_models
from tests.one_worker import OneWorker
from twostroke.v1 import worker_pb2 as pb

BLOCK = 4
LENGTHS = (1, 3, 4, 5, 8, 13, 16, 40, 61)


@pytest.fixture(scope="module", params=["qwen3", "qwen3-moe"])
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("model")
    return hf_models.save(request.param, directory), directory


@pytest.fixture(scope="module")
def loaded(theirs: tuple[Any, Path]) -> LoadedModel:
    return LoadedModel(hf_models.load_ours(theirs[1]), REFERENCE, torch.device("cpu"))


def worker(loaded: LoadedModel, blocks: int = 400, chunk_tokens: int = 512, max_batch: int = 32) -> OneWorker:
    return OneWorker(worker_parts(loaded, blocks, BLOCK), chunk_tokens=chunk_tokens, max_batch=max_batch)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 500, (length,), generator=generator).tolist() for length in lengths]


def greedy(tokens: list[int], count: int) -> SequenceSpec:
    return spec(tokens, len(tokens) + count, temperature=0, block_size=BLOCK)


@pytest.mark.parametrize("chunk_tokens", [7, 512])
def test_greedy_answers_equal_transformers(loaded: LoadedModel, theirs: tuple[Any, Path], chunk_tokens: int) -> None:
    asked = prompts()
    one = worker(loaded, chunk_tokens=chunk_tokens)
    wanted = hf_models.greedy(theirs[0], asked, 12)
    assert one.run([greedy(tokens, 12) for tokens in asked]) == wanted
    assert one.run([greedy(tokens, 12) for tokens in asked]) == wanted, "with prefixes in the cache"


def test_few_blocks_preempt_and_answers_stay_the_same(loaded: LoadedModel, theirs: tuple[Any, Path]) -> None:
    asked = prompts((9, 10, 11, 12, 13, 30))
    one = worker(loaded, blocks=24, chunk_tokens=7)
    assert one.run([greedy(tokens, 30) for tokens in asked], headroom_tokens=1) == hf_models.greedy(
        theirs[0], asked, 30
    )
    assert one.preemptions > 0


def test_decoding_goes_on_between_chunks(loaded: LoadedModel) -> None:
    short, long = prompts((4, 60))
    one = worker(loaded, chunk_tokens=6)
    decoding = one.ask(greedy(short, 30))
    one.turn()
    prefilling = one.ask(greedy(long, 2))
    one.tokens_of_step.clear()
    while prefilling not in one.outputs:
        one.turn()
    assert one.tokens_of_step == [[decoding]] * 9 + [[decoding, prefilling]], "who is there is in the next step"
    one.finish()
    assert (len(one.outputs[decoding]), len(one.outputs[prefilling])) == (30, 2)


def test_who_comes_before_a_step_is_launched_is_in_it(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first_prompt, second_prompt = prompts((4, 9))
    one = worker(loaded)
    first = one.ask(greedy(first_prompt, 30))
    one.turn()
    one.turn()  # that there is no other prompt is known now
    monkeypatch.setattr(DecodeLoop, "spare_seconds", lambda _: 0.005 if one.scheduler.running_count else 0.0)
    one.tokens_of_step.clear()
    one.turn()
    assert one.tokens_of_step == [], "the step that runs has a while to go"
    second = one.ask(greedy(second_prompt, 30))
    one.turn()
    assert one.tokens_of_step == [[first, second]]
    one.cancel(first)
    one.turn()
    assert one.scheduler.get(first) is None, "whoever leaves is heard meanwhile"
    monkeypatch.undo()
    one.finish()
    assert len(one.outputs[second]) == 30


def test_the_blocks_that_were_reserved_are_those_it_decodes_in(loaded: LoadedModel) -> None:
    (tokens,) = prompts((14,))
    one = worker(loaded, chunk_tokens=4)
    attempt = one.ask(greedy(tokens, 10), headroom_tokens=10)
    one.turn()
    assert one.parts.blocks.in_use_count == 4
    assert one.scheduler.promised == 2
    while attempt not in one.outputs:
        one.turn()
    assert one.sequence(attempt).state is State.RUNNING
    assert one.parts.blocks.in_use_count == 4
    one.finish()


def test_cached_blocks_are_not_computed_again_but_the_last_token_is(loaded: LoadedModel) -> None:
    (tokens,) = prompts((16,))
    one = worker(loaded)
    for cached in (0, 12):
        attempt = one.ask(greedy(tokens, 3))
        one.finish()
        assert one.cached[attempt] == cached
    follow_up = [*tokens, *one.outputs[attempt]]
    attempt = one.ask(greedy(follow_up, 3))
    one.finish()
    assert one.cached[attempt] == 16, "18 tokens had KV: the last one of an answer is never run"


def test_a_prefix_that_is_being_computed_is_waited_for_and_shared(
    loaded: LoadedModel, theirs: tuple[Any, Path]
) -> None:
    shared, *tails = prompts((24, 1, 2))
    asked = [shared + tail for tail in tails]
    one = worker(loaded, chunk_tokens=8)
    first, second = (one.ask(greedy(tokens, 4)) for tokens in asked)
    one.turn()
    assert one.parts.blocks.in_use_count == 14, "both have reserved theirs"
    while second not in one.outputs:
        one.turn()
    assert one.parts.blocks.in_use_count == 8, "the second gave six back, and shares them"
    assert (one.cached[first], one.cached[second]) == (0, 24)
    one.finish()
    assert [one.outputs[first], one.outputs[second]] == hf_models.greedy(theirs[0], asked, 4)


@pytest.mark.parametrize("gone", ["cancelled", "router gone"])
@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding"])
def test_who_leaves_takes_nothing_along(loaded: LoadedModel, state: str, gone: str) -> None:
    ahead, tokens = prompts((20, 20))
    one = worker(loaded, chunk_tokens=8)
    if state == "waiting":
        one.ask(greedy(ahead, 4))
    attempt = one.ask(greedy(tokens, 50))
    one.turn()
    while state == "decoding" and len(one.outputs.get(attempt, [])) < 3:
        one.turn()
    assert (one.sequence(attempt).state is State.RUNNING) == (state == "decoding")
    if gone == "cancelled":
        one.cancel(attempt)
    else:
        one.router_gone()
    one.turn()
    assert one.scheduler.get(attempt) is None
    one.finish()
    again = one.ask(greedy(tokens, 50))
    one.finish()
    assert len(one.outputs[again]) == 50
    assert attempt not in one.ended


def test_an_id_is_not_taken_again_before_the_last_chunk_of_the_dropped_prompt_is_computed(loaded: LoadedModel) -> None:
    """As on a GPU, where a batch is under way between two turns. The new prompt would push out the old one, whose
    blocks would never come home."""
    dropped, other = (greedy(tokens, 4) for tokens in prompts((20, 20)))
    one = worker(loaded, chunk_tokens=4)
    one._own._loop._batches_ahead = 1
    attempt = one.ask(dropped)
    one.turn()
    one.cancel(attempt)
    one._attempts -= 1
    assert one.ask(other) == attempt
    for _ in range(20):
        one.turn()
    assert one.ended == {attempt: pb.Ended.CAUSE_REJECTED}
    assert one.parts.blocks.in_use_count == 0


def test_running_sequences_are_preempted_and_the_prompt_under_way_is_not(loaded: LoadedModel) -> None:
    asked = prompts((4, 4, 40))
    one = worker(loaded, blocks=15, chunk_tokens=2)
    running = [one.ask(greedy(tokens, 20), headroom_tokens=1) for tokens in asked[:2]]
    while len(one.outputs) < 2:
        one.turn()
    long = one.ask(greedy(asked[2], 2), headroom_tokens=1)
    while not one.ended.keys() >= set(running):
        one.turn()
        assert one.sequence(long).state is State.PREFILLING
    assert [one.ended[attempt] for attempt in running] == [pb.Ended.CAUSE_PREEMPTED] * 2
    one.finish()
    assert one.ended[long] == pb.Ended.CAUSE_FINISHED
    assert len(one.outputs[long]) == 2


def test_no_room_is_refused_and_takes_nothing(loaded: LoadedModel) -> None:
    one = worker(loaded, blocks=14)
    held = one.ask(greedy(prompts((40,))[0], 4))
    refused = one.ask(greedy(prompts((16,), seed=1)[0], 4))
    one.turn()
    assert one.refused == {refused}
    one.finish()
    assert held in one.ended
    assert refused not in one.outputs


@pytest.mark.parametrize("why", ["length", "stop token"])
def test_the_first_token_may_be_the_last(loaded: LoadedModel, why: str) -> None:
    (tokens,) = prompts((10,))
    one = worker(loaded)
    asked = greedy(tokens, 1 if why == "length" else 20)
    if why == "stop token":
        ((first, _),) = one.run([greedy(tokens, 2)])
        asked = replace(asked, stop_token_ids=frozenset([first]))
    attempt = one.ask(asked)
    one.finish()
    assert len(one.outputs[attempt]) == 1
    assert one.ended[attempt] == pb.Ended.CAUSE_FINISHED


def test_sampled_answers_with_penalties_do_not_depend_on_who_prefills_beside(loaded: LoadedModel) -> None:
    asked = prompts((5, 9, 30))
    specs = [spec(tokens, len(tokens) + 10, temperature=0.9, seed=3, block_size=BLOCK) for tokens in asked]
    alone = [worker(loaded).run([one])[0] for one in specs]
    assert worker(loaded, chunk_tokens=4).run(specs) == alone


def with_host_memory(loaded: LoadedModel, blocks: int, slots: int) -> tuple[OneWorker, HostCache]:
    parts = worker_parts(loaded, blocks, BLOCK)
    cache = HostCache(parts.blocks, host_memory.allocate(parts.pool, slots))
    return OneWorker(replace(parts, host_cache=cache), chunk_tokens=16), cache


def test_prompts_are_loaded_and_answers_stay_the_same(loaded: LoadedModel, theirs: tuple[Any, Path]) -> None:
    asked = prompts((16, 40, 61, 30, 50))
    one, cache = with_host_memory(loaded, blocks=28, slots=100)
    wanted = hf_models.greedy(theirs[0], asked, 12)
    for _ in range(3):
        assert one.run([greedy(tokens, 12) for tokens in asked]) == wanted
    assert one._engine._metrics.loaded_tokens._value.get() > 100
    while not cache.all_saved:
        cache.turn()
    assert cache.slots.in_use_count == 0


def test_a_sequence_that_is_dropped_while_it_alone_loads_gives_its_blocks_back(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker has nothing else to do, and goes on until the load is over."""
    one, cache = with_host_memory(loaded, blocks=20, slots=100)
    first, other = prompts((40, 60))
    one.run([greedy(first, 2), greedy(other, 2)])
    arrived, copies_arrive = ThreadCopy.done, False
    monkeypatch.setattr(ThreadCopy, "done", lambda copy: copies_arrive and arrived(copy))
    attempt = one.ask(greedy(first, 2))
    one.turn()
    one.cancel(attempt)
    for _ in range(3):
        one.turn()
    assert not one._engine._idle
    assert one._wire.timeouts[-1] == LOAD_POLL_SECONDS
    assert one.parts.blocks.in_use_count == 10
    copies_arrive = True
    one.finish()
    while not cache.all_saved:  # what the others said is saved by a thread, for which a worker need not wait
        cache.turn()
    assert cache.slots.in_use_count == 0


def test_nothing_is_ever_lost_whoever_leaves_whenever(loaded: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(5)

    def draw(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    one = worker(loaded, blocks=40, chunk_tokens=9, max_batch=6)
    asked: list[int] = []
    for turn in range(400):
        if draw(3) == 0:
            shared = prompts((12,), seed=draw(3))[0]
            tokens = shared[: 4 * draw(4)] + prompts((1 + draw(30),), seed=turn)[0]
            asked.append(one.ask(greedy(tokens, 1 + draw(30)), headroom_tokens=draw(20)))
        if asked and draw(6) == 0:
            one.cancel(asked[draw(len(asked))])
        if turn % 150 == 149:
            one.router_gone()
        one.turn()
        blocks: BlockPool = one.parts.blocks
        assert blocks.free_count + blocks.cached_count + blocks.in_use_count == 40
    one.finish()
    causes = set(one.ended.values())
    assert causes == {pb.Ended.CAUSE_FINISHED, pb.Ended.CAUSE_PREEMPTED}
    assert one.refused
