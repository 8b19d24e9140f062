"""A cluster whose workers keep KV in 8-bit floats, on every way that KV can take."""

import pytest

from common.model.model_files import EMBEDDED, resolve
from tests import rounded_kv
from tests.e2e import reference
from tests.e2e.cluster import Cluster
from tests.e2e.prompts import prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

LENGTHS = (1, 7, 16, 33, 64, 65, 129, 257)
TOKENS = 24


def test_answers_are_those_of_transformers_with_the_same_rounding() -> None:
    """Handed over, prefilled in place, with prefix hits on both sides, and preempted."""
    asked = prompts(LENGTHS, seed=6)
    workers = {"kv-cache-dtype": "fp8"}
    decode = {"prefill-tokens": 16, "num-blocks": 44}
    with Cluster(worker_flags=workers, decode_flags=decode, router_flags={"headroom-tokens": 1}) as cluster:
        answers = [cluster.ask_all(asked, TOKENS) for _ in range(2)]
        cluster.assert_blocks_home()
        model = cluster.client.model()
    assert (model.dtype, model.kv_cache_dtype) == ("float32", "float8_e4m3fn")
    finishes = [answer.finish for answer in [*answers[0], *answers[1]]]
    assert any(finish.usage.decode_cached_tokens for finish in finishes)
    assert any(finish.usage.resumes for finish in finishes)
    outputs = [answer.token_ids for answer in [*answers[0], *answers[1]]]
    rounded_kv.assert_greedy(reference.reference_model(resolve(EMBEDDED)), asked * 2, outputs, TOKENS)


def test_workers_that_keep_kv_differently_do_not_work_together() -> None:
    with Cluster(worker_flags={"kv-cache-dtype": "fp8"}) as cluster:
        cluster.start_worker("decode", 1, **{"kv-cache-dtype": "auto"})
        cluster.wait_for(lambda: bool(cluster.client.load().problems))
        (problem,) = cluster.client.load().problems
        assert "its KV dtype is 'float32', and that of" in problem.reason
        assert problem.reason.endswith("is 'float8_e4m3fn'")
