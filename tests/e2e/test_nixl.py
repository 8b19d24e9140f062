"""Pairs whose KV crosses between hosts. On one machine UCX_TLS=tcp makes it go the way that it would go there."""

from collections.abc import Iterator

import pytest

from tests.e2e.asking import Asking
from tests.e2e.cluster import Cluster
from tests.e2e.hosts import Host, why_not
from tests.e2e.tiny import prompt, tiny_cluster
from twostroke import Client, Unavailable

pytest.importorskip("nixl", reason="NIXL is not installed")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

REASON = why_not()
FLAGS = {"transport": "nixl"}


@pytest.fixture(scope="module", autouse=True)
def over_tcp() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", "tcp")
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with tiny_cluster(tmp_path_factory.mktemp("tiny"), worker_flags=FLAGS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def through_shm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with tiny_cluster(tmp_path_factory.mktemp("tiny")) as cluster:
        yield cluster


def ask(client: Client, tokens: list[int], max_tokens: int = 16) -> tuple[int, ...]:
    return client.generate(tokens, max_tokens=max_tokens, temperature=0, ignore_eos=True, timeout=60).token_ids


def test_answers_are_those_of_a_cluster_that_shares_memory(pair: Cluster, through_shm: Cluster) -> None:
    asked = [prompt(length, seed) for seed, length in enumerate((1, 15, 16, 17, 250, 1200))]
    for client in (pair.client, through_shm.client):
        asking = [Asking(client, tokens, max_tokens=16) for tokens in asked]
        for each in asking:
            each.join(timeout=60)
            assert each.error is None
    for tokens in asked:
        assert ask(pair.client, tokens) == ask(through_shm.client, tokens)
    pair.assert_blocks_home()


def test_a_killed_prefill_worker_is_replaced(pair: Cluster) -> None:
    tokens = prompt(300, seed=10)
    expected = ask(pair.client, tokens)
    for seed in (11, 12):
        pair.processes["prefill-0"].kill()
        pair.processes["prefill-0"].wait()
        pair.wait_for(lambda: not pair.workers("prefill"))
        with pytest.raises(Unavailable):
            ask(pair.client, prompt(300, seed))
        pair.start_worker("prefill", 0)
        pair.wait_until_ready()
        assert ask(pair.client, prompt(20, seed) + tokens[20:])
        assert ask(pair.client, tokens) == expected
        pair.assert_blocks_home()


@pytest.mark.slow
@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_a_pair_of_two_hosts(tmp_path_factory: pytest.TempPathFactory, through_shm: Cluster) -> None:
    directory = tmp_path_factory.mktemp("tiny")
    with Host() as host, tiny_cluster(directory, worker_flags=FLAGS, hosts={"prefill-0": host}) as cluster:
        first, second, third = (prompt(1000, seed) for seed in (30, 31, 32))
        assert ask(cluster.client, first) == ask(through_shm.client, first)
        cluster.assert_blocks_home()
        # Cut off while its KV is read: what was read of it may still arrive, so these blocks are kept until the way is
        # back, or TCP gives it up.
        host.outward.delay_seconds = 0.5
        asking = Asking(cluster.client, second, max_tokens=16)
        cluster.wait_for(lambda: bool(asking.tokens))  # the first one, which comes before the KV
        host.cut()
        asking.join(timeout=30)
        assert isinstance(asking.error, Unavailable)
        assert sum(worker.blocks.in_use for worker in cluster.client.load().workers)
        host.heal()
        cluster.wait_until_ready()
        cluster.assert_blocks_home()
        assert ask(cluster.client, third) == ask(through_shm.client, third)
        cluster.assert_blocks_home()
