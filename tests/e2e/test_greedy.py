"""Greedy answers of whole clusters equal those of transformers, whatever way they took."""

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from router.dispatch.settled import LEAST_BATCH
from tests.e2e import reference
from tests.e2e.asking import assert_all_greedy
from tests.e2e.cluster import Cluster
from tests.e2e.prompts import prompts, tokenizer
from twostroke import AsyncClient

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ALL_LENGTHS: tuple[int, ...]
ALL_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 80, 100, 127, 128, 129, 150, 200)
ALL_LENGTHS += (255, 256, 257, 384, 1_500)
SOME_LENGTHS = (1, 7, 16, 33, 64, 129, 257)


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    with Cluster(worker_flags={"num-blocks": 1024}) as cluster:  # room for 32 prompts and their answers at once
        yield cluster


def test_32_prompts_at_once(pair: Cluster) -> None:
    asked = prompts(ALL_LENGTHS, seed=1)
    assert len(asked) == 32
    answers = pair.ask_all(asked, 64)
    pair.assert_blocks_home()
    assert_all_greedy(asked, answers, 64)


@pytest.mark.parametrize(
    ("prefill", "decode", "flags"),
    [
        pytest.param(1, 1, {"block-size": 4, "num-blocks": 4096, "max-batch-tokens": 32}, id="tiny blocks and chunks"),
        pytest.param(2, 2, {}, id="two pairs", marks=pytest.mark.slow),
    ],
)
def test_other_ways(prefill: int, decode: int, flags: dict[str, object]) -> None:
    asked = prompts(SOME_LENGTHS, seed=2)
    prefill_only = {name: value for name, value in flags.items() if name == "max-batch-tokens"}
    both = {name: value for name, value in flags.items() if name not in prefill_only}
    with Cluster(prefill=prefill, decode=decode, worker_flags=both, prefill_flags=prefill_only) as cluster:
        answers = cluster.ask_all(asked, 24)
        cluster.assert_blocks_home()
    assert_all_greedy(asked, answers, 24)


def test_drafts() -> None:
    """The second time with prefix hits; with a pool that has no room for all at once."""
    asked = prompts(SOME_LENGTHS, seed=2)
    flags = {"draft-tokens": 4, "num-blocks": 40}
    with Cluster(metrics=True, router_flags={"headroom-tokens": 1}, decode_flags=flags) as cluster:
        for _ in range(2):
            answers = cluster.ask_all(asked, 24)
            cluster.assert_blocks_home()
            assert_all_greedy(asked, answers, 24)
        assert cluster.metric("decode-0", "twostroke_kept_drafts_total") > 0


def test_prefix_hits_on_either_side_and_on_both(pair: Cluster) -> None:
    asked = prompts((40, 100, 260), seed=3)
    first = pair.ask_all(asked, 12)
    both = pair.ask_all(asked, 12)
    pair.kill("decode-0")
    pair.start_worker("decode", 0)
    pair.wait_for(lambda: not pair.workers("decode"))
    pair.wait_until_ready()
    prefill_side = pair.ask_all(asked, 12)
    pair.kill("prefill-0")
    pair.wait_for(lambda: not pair.workers("prefill"))
    pair.start_worker("prefill", 0)
    pair.wait_until_ready()
    decode_side = pair.ask_all(asked, 12)
    pair.assert_blocks_home()
    cached = [
        [
            (answer.finish.usage.prefill_cached_tokens > 0, answer.finish.usage.decode_cached_tokens > 0)
            for answer in answers
        ]
        for answers in (first, both, prefill_side, decode_side)
    ]
    assert cached == [[(False, False)] * 3, [(True, True)] * 3, [(True, False)] * 3, [(False, True)] * 3]
    for answers in (first, both, prefill_side, decode_side):
        assert_all_greedy(asked, answers, 12)


def test_the_next_turn_finds_the_answer_of_the_last_one(pair: Cluster) -> None:
    (prompt,) = prompts((50,), seed=4)
    (answer,) = pair.ask_all([prompt], 40)
    turn = [*prompt, *answer.token_ids, *prompt[:5]]
    (next_answer,) = pair.ask_all([turn], 16)
    pair.assert_blocks_home()
    assert next_answer.finish.usage.decode_cached_tokens == 80, "89 tokens have KV on the decode worker: 5 blocks"
    assert_all_greedy([turn], [next_answer], 16)


def test_preemption_every_few_steps() -> None:
    asked = prompts(tuple(range(30, 42)), seed=5)
    flags = {"num-blocks": 40}  # they start with 3 blocks each and need up to 6
    with Cluster(decode_flags=flags, router_flags={"headroom-tokens": 1}) as cluster:
        answers = cluster.ask_all(asked, 48)
        cluster.assert_blocks_home()
    assert sum(answer.finish.usage.resumes for answer in answers) >= 5
    assert_all_greedy(asked, answers, 48)


def test_streams_that_share_a_call(pair: Cluster) -> None:
    asked = prompts(tuple(range(1, 41)), seed=5)
    assert len(asked) > LEAST_BATCH, "enough of them that the router settles them"

    async def ask(client: AsyncClient, prompt: Sequence[int]) -> tuple[str, list[int]]:
        text = ""
        tokens: list[int] = []
        async for piece in client.stream(prompt, max_tokens=24, temperature=0, ignore_eos=True):
            text += piece.text
            tokens += piece.token_ids
        return text, tokens

    async def ask_all() -> list[tuple[str, list[int]]]:
        async with AsyncClient(pair.target, share_call=True) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in asked))

    answers = asyncio.run(ask_all())
    pair.assert_blocks_home()
    assert [len(tokens) for _, tokens in answers] == [24] * len(asked)
    reference.assert_all_greedy(asked, [tokens for _, tokens in answers])
    for text, tokens in answers:
        assert text == tokenizer().decode(tokens, skip_special_tokens=True)
