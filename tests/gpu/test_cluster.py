"""Whole clusters on GPUs: a process each, KV handed over by CUDA IPC or NIXL, on one shared GPU and on two."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.e2e.cluster import Cluster
from tests.gpu.greedy import LENGTHS, assert_greedy, text
from twostroke import AsyncClient

pytestmark = pytest.mark.timeout(180)

OUTPUT_TOKENS = 64
REQUESTS, AT_ONCE = 2_000, 128


@pytest.fixture(
    scope="module",
    params=[
        "one GPU",
        "one GPU, host memory",
        "one GPU, drafts",
        "two GPUs",
        "two GPUs, host memory",
        "two GPUs, NIXL",
        "two GPUs, NIXL over TCP",
    ],
)
def cluster(request: pytest.FixtureRequest, smollm2: Path) -> Iterator[Cluster]:
    two, over_nixl = "two GPUs" in request.param, "NIXL" in request.param
    if two and torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    if over_nixl:
        pytest.importorskip("nixl", reason="NIXL is not installed")
    flags = {"model": smollm2, "dtype": "float32", "max-length": 2048, "num-blocks": 2048}
    flags["transport"] = "nixl" if over_nixl else "cuda_ipc"
    with pytest.MonkeyPatch.context() as patch:
        if "TCP" in request.param:  # as between hosts without RDMA
            patch.setenv("UCX_TLS", "tcp,cuda_copy")
        prefill: dict[str, object] = {"device": "cuda:1"} if two else {}
        if "host memory" in request.param:
            prefill |= {"num-blocks": 192, "host-cache-gib": 2}  # of the 32 prompts below, the pool holds a third
        decode: dict[str, object] = {"max-batch": 64}
        if "drafts" in request.param:
            decode["draft-tokens"] = 4
        yield from _running(flags, smollm2, prefill, decode)


def _running(
    flags: dict[str, object], smollm2: Path, prefill: dict[str, object], decode: dict[str, object]
) -> Iterator[Cluster]:
    with Cluster(
        router_flags={"model": smollm2, "worker-grace": 60},
        worker_flags=flags | {"device": "cuda:0"},
        prefill_flags=prefill,
        decode_flags=decode,
    ) as cluster:
        yield cluster


def test_32_prompts_at_once_twice(cluster: Cluster, smollm2: Path) -> None:
    asked = text(smollm2, LENGTHS)
    for _ in range(2):  # the second time with prefix hits on both sides
        answers = cluster.ask_all(asked, OUTPUT_TOKENS)
        assert_greedy(smollm2, asked, [answer.token_ids for answer in answers], OUTPUT_TOKENS)
        cluster.assert_blocks_home()
    for answer in answers:
        usage = answer.finish.usage
        assert usage.decode_cached_tokens == usage.prompt_tokens // 16 * 16
        assert usage.prefill_cached_tokens == (usage.prompt_tokens - 1) // 16 * 16


def test_cancels_at_random_moments(cluster: Cluster, smollm2: Path) -> None:
    """2,000 requests, half of them cancelled somewhere between their call and their last token."""
    finished = asyncio.run(cancel_at_random(cluster.target))
    assert 0.3 * REQUESTS < finished < 0.9 * REQUESTS
    cluster.assert_blocks_home()
    asked = text(smollm2, (100, 300), seed=3)
    assert_greedy(smollm2, asked, [answer.token_ids for answer in cluster.ask_all(asked, OUTPUT_TOKENS)], OUTPUT_TOKENS)


async def cancel_at_random(target: str) -> int:
    """How many of the requests came to an end of their own."""
    draw = random.Random(5)
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(client: AsyncClient, prompt: Sequence[int], count: int, patience: float | None) -> bool:
        async with turn:
            try:
                async with asyncio.timeout(patience):
                    answer = await client.generate(prompt, max_tokens=count, ignore_eos=True)
            except TimeoutError:
                return False
        assert len(answer.token_ids) == count
        return True

    async with AsyncClient(target, timeout=120) as client:
        work = [
            one(
                client,
                draw.choices(range(1_000, 40_000), k=draw.randint(1, 600)),
                draw.randint(1, 64),
                draw.uniform(0, 0.8) if draw.random() < 0.5 else None,
            )
            for _ in range(REQUESTS)
        ]
        return sum(await asyncio.gather(*work))


def test_a_killed_prefill_worker(cluster: Cluster, smollm2: Path) -> None:
    """Its GPU memory is mapped by the decode worker, which goes on, and takes KV from the one that comes after it."""
    asked = text(smollm2, (700, 900, 1_100, 1_300), seed=7)
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(cluster.ask_all, asked, OUTPUT_TOKENS)
        cluster.wait_for(lambda: cluster.client.load().running > 0)
        cluster.kill("prefill-0")
        cluster.start_worker("prefill", 0)
        token_ids = [answer.token_ids for answer in answers.result()]
    assert_greedy(smollm2, asked, token_ids, OUTPUT_TOKENS)
    cluster.wait_until_ready()
    cluster.assert_blocks_home()
