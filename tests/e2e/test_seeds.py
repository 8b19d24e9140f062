"""A seed and a position give a token, whatever the batch, the pair of workers and the interruptions."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.prompts import prompts
from twostroke import Generation
from twostroke.request import Options

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

SAMPLED: Options = {
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 50,
    "seed": 2**63 + 11,
    "max_tokens": 40,
    "ignore_eos": True,
}
PENALISED: Options = {
    **SAMPLED,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "min_p": 0.01,
}


def ask(cluster: Cluster, prompt: list[int], options: Options) -> Generation:
    return cluster.client.generate(prompt, timeout=120, **options)


@pytest.mark.parametrize("options", [SAMPLED, PENALISED], ids=["plain", "penalties"])
def test_the_same_tokens_alone_in_a_batch_after_preemption_and_elsewhere(options: Options) -> None:
    prompt, *others = prompts((37, *range(20, 35)), seed=6)
    with Cluster() as cluster:
        alone = ask(cluster, prompt, options)
        with ThreadPoolExecutor(16) as pool:
            beside = [pool.submit(ask, cluster, other, {**options, "seed": seed}) for seed, other in enumerate(others)]
            batched = pool.submit(ask, cluster, prompt, options).result()
            assert {tuple(answer.result().token_ids) for answer in beside}.isdisjoint({alone.token_ids})
    scarce = Cluster(decode_flags={"num-blocks": 16}, router_flags={"headroom-tokens": 1})
    with scarce as cluster, ThreadPoolExecutor(16) as pool:
        beside = [pool.submit(ask, cluster, other, options) for other in others[:7]]
        preempted = pool.submit(ask, cluster, prompt, options).result()
        resumes = preempted.finish.usage.resumes + sum(one.result().finish.usage.resumes for one in beside)
    assert resumes > 0
    assert alone.token_ids == batched.token_ids == preempted.token_ids
