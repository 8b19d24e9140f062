"""Clusters with pools so small that most of what is asked again must come back from host memory."""

import pytest

from tests.e2e.asking import assert_all_greedy
from tests.e2e.cluster import Cluster
from tests.e2e.prompts import prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

LENGTHS = (65, 100, 129, 160, 161, 200, 257)
BLOCKS = {"num-blocks": 24}  # less than half of what these take
HOST_BLOCKS = 72  # of 0.7 MiB
TOKENS = 4


@pytest.mark.parametrize(
    ("role", "flags"),
    [
        ("prefill", {"max-batch-tokens": 64}),
        pytest.param("decode", {"prefill-tokens": 512, "prefill-chunk-tokens": 64}, marks=pytest.mark.slow),
    ],
)
def test_prompts_asked_again_are_loaded_and_answers_stay_the_same(role: str, flags: dict[str, object]) -> None:
    asked = prompts(LENGTHS, seed=8)
    small = {**BLOCKS, **flags}
    cluster = Cluster(
        prefill=role == "prefill",
        worker_flags={"host-cache-gib": 0.05},
        prefill_flags=small if role == "prefill" else {},
        decode_flags=small if role == "decode" else {},
        metrics=True,
    )
    with cluster:
        answers = [cluster.ask_all(asked, TOKENS) for _ in range(2)]
        cluster.assert_blocks_home()
        (worker,) = cluster.workers(role)
        others = [other for other in cluster.client.load().workers if other.instance != worker.instance]
        cluster.wait_for(lambda: cluster.workers(role)[0].host_blocks.in_use == 0)
        loaded = cluster.metric(f"{role}-0", 'twostroke_prompt_tokens_total{source="host memory"}')
    for again in answers:
        assert_all_greedy(asked, again, TOKENS)
    for prompt, answer in zip(asked, answers[1], strict=True):
        usage = answer.finish.usage
        cached = usage.prefill_cached_tokens if role == "prefill" else usage.decode_cached_tokens
        assert cached == (len(prompt) - 1) // 16 * 16
    assert worker.host_blocks.total == HOST_BLOCKS
    assert all(worker.host_blocks.total == 0 for worker in others), "they never prefill"
    assert worker.host_blocks.cached > worker.blocks.total
    assert loaded > sum(LENGTHS) / 2
