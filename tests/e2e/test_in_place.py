"""Clusters of decode workers that prefill: alone, beside a prefill worker, and when something goes wrong."""

import signal
from collections.abc import Iterator

import pytest

from tests.e2e.asking import LONG, SHORT, Asking, assert_all_greedy, assert_well, reach
from tests.e2e.cluster import Cluster
from tests.e2e.prompts import prompts
from tests.e2e.reference import assert_greedy
from twostroke import DeadlineExceeded

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

LENGTHS = (1, 7, 16, 33, 64, 65, 129, 257)
# Chunks so small that the long prompt takes a second or more, and can be caught in the middle.
BOTH = {"prefill-tokens": 64, "prefill-chunk-tokens": 32}


@pytest.fixture(scope="module")
def one() -> Iterator[Cluster]:
    with Cluster(prefill=0, decode_flags=BOTH) as cluster:
        yield cluster


def prefilling(cluster: Cluster) -> bool:
    return any(worker.waiting for worker in cluster.workers("decode"))


@pytest.mark.slow
def test_mixed_lengths_at_once(one: Cluster) -> None:
    asked = prompts(LENGTHS, seed=2)
    answers = one.ask_all(asked, 16)
    again = one.ask_all(asked, 16)
    one.assert_blocks_home()
    assert_all_greedy(asked, [*answers], 16)
    assert_all_greedy(asked, [*again], 16)
    for prompt, answer in zip(asked, again, strict=True):
        usage, timing = answer.finish.usage, answer.finish.timing
        assert usage.decode_cached_tokens == (len(prompt) - 1) // 16 * 16
        assert usage.prefill_cached_tokens == timing.transfer_ms == 0
        assert 0 < timing.prefill_ms <= timing.total_ms - timing.decode_ms


@pytest.mark.slow
def test_short_prompts_in_place_and_long_ones_handed_over() -> None:
    asked = prompts(LENGTHS, seed=3)
    with Cluster(decode_flags=BOTH) as cluster:
        answers = cluster.ask_all(asked, 16)
        (prefill,), (decode,) = cluster.workers("prefill"), cluster.workers("decode")
        cluster.kill("prefill-0")
        (asked_alone,) = prompts((300,), seed=9)
        alone = cluster.ask_all([asked_alone], 16)
        cluster.assert_blocks_home()
    assert_all_greedy([*asked, asked_alone], [*answers, *alone], 16)
    in_place = [answer.finish.timing.transfer_ms == 0 for answer in answers]
    assert in_place == [len(prompt) <= 64 for prompt in asked]
    assert decode.totals.prefilled_tokens == sum(length for length in LENGTHS if length <= 64)
    assert prefill.totals.prefilled_tokens == sum(length for length in LENGTHS if length > 64)
    assert alone[0].finish.timing.transfer_ms == 0


@pytest.mark.slow
def test_preemption_while_others_prefill() -> None:
    asked = prompts(tuple(range(30, 42)), seed=5)
    flags = {**BOTH, "num-blocks": 40}  # they start with 3 blocks each and need up to 6
    with Cluster(prefill=0, decode_flags=flags, router_flags={"headroom-tokens": 1}) as cluster:
        answers = cluster.ask_all(asked, 48)
        cluster.assert_blocks_home()
    assert sum(answer.finish.usage.resumes for answer in answers) >= 2
    assert_all_greedy(asked, answers, 48)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["prefilling", "decoding"])
def test_the_client_leaves(one: Cluster, state: str) -> None:
    prompt = LONG if state == "prefilling" else SHORT
    stream = one.client.stream(prompt, max_tokens=400, temperature=0, ignore_eos=True, cache_salt=state)
    for piece in stream:
        if state == "prefilling" or piece.token_ids:
            break
    if state == "prefilling":
        one.wait_for(lambda: prefilling(one))
    stream.close()
    assert_well(one)


@pytest.mark.slow
def test_the_deadline_passes_while_prefilling(one: Cluster) -> None:
    with pytest.raises(DeadlineExceeded):
        one.client.generate(LONG, max_tokens=4, temperature=0, timeout=0.5, cache_salt="deadline")
    assert_well(one)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["prefilling", "decoding"])
def test_a_worker_is_killed_and_another_goes_on(state: str) -> None:
    prompt = LONG[:600] if state == "prefilling" else SHORT
    with Cluster(prefill=0, decode=2, decode_flags=BOTH) as cluster:
        asking = Asking(cluster.client, prompt, max_tokens=30)
        if state == "prefilling":
            cluster.wait_for(lambda: prefilling(cluster))
        else:
            reach(cluster, asking, "decoding")
        busy = [worker.address for worker in cluster.workers("decode") if worker.running or worker.waiting]
        (victim,) = [name for name, address in cluster.addresses("decode").items() if address in busy]
        cluster.kill(victim)
        asking.join(timeout=60)
        assert asking.error is None
        assert len(asking.tokens) == 30
        assert_greedy(prompt, asking.tokens)
        assert_well(cluster)


@pytest.mark.slow
def test_a_worker_drains_on_sigterm_what_it_prefills(one: Cluster) -> None:
    asking = Asking(one.client, LONG[:600], max_tokens=10)
    one.wait_for(lambda: prefilling(one))
    one.signal("decode-0", signal.SIGTERM)
    asking.join(timeout=60)
    assert asking.error is None
    assert asking.pieces[-1].finish is not None
    assert asking.pieces[-1].finish.usage.resumes == 0
    assert one.processes["decode-0"].wait(timeout=10) == 0
    one.start_worker("decode", 0)
    one.wait_until_ready()
    assert_well(one)
