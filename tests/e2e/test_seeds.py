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
    "max_tokens": 28,
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


def test_the_same_tokens_alone_in_a_batch_after_preemption_and_elsewhere() -> None:
    prompt, *others = prompts((37, *range(20, 35)), seed=6)
    kinds = (SAMPLED, PENALISED)
    with Cluster() as cluster:
        alone = [ask(cluster, prompt, options).token_ids for options in kinds]
        with ThreadPoolExecutor(16) as pool:
            beside = [
                pool.submit(ask, cluster, other, {**kinds[seed % 2], "seed": seed})
                for seed, other in enumerate(others[:14])
            ]
            batched = [answer.token_ids for answer in pool.map(lambda kind: ask(cluster, prompt, kind), kinds)]
            assert {tuple(answer.result().token_ids) for answer in beside}.isdisjoint(map(tuple, alone))
    scarce = Cluster(decode_flags={"num-blocks": 16}, router_flags={"headroom-tokens": 1})
    with scarce as cluster, ThreadPoolExecutor(16) as pool:
        crowd = [pool.submit(ask, cluster, other, kinds[place % 2]) for place, other in enumerate(others[:6])]
        answers = list(pool.map(lambda kind: ask(cluster, prompt, kind), kinds))
        preempted = [answer.token_ids for answer in answers]
        answers += [one.result() for one in crowd]
    assert sum(answer.finish.usage.resumes for answer in answers) > 0
    assert alone == batched == preempted
