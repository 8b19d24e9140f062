"""Workers of several hosts behind one router: KV does not leave a host, so a pair is of one."""

from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.router.cluster import Cluster, cluster, eventually, expected
from tests.router.fake_worker import DECODE, PREFILL, FakeWorker, Script

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def health(it: Cluster) -> "health_pb2.HealthCheckResponse.ServingStatus.ValueType":
    return (await health_pb2_grpc.HealthStub(it.channel).Check(health_pb2.HealthCheckRequest())).status


async def test_pairs_are_of_one_host(model: Path) -> None:
    prefills = [FakeWorker(PREFILL, host=host) for host in ("a", "b")]
    decodes = [
        FakeWorker(DECODE, host=host, num_blocks=blocks) for host, blocks in (("a", 140), ("b", 130), ("c", 4096))
    ]
    async with cluster(model, prefills, decodes) as it:
        for number in range(8):  # by room alone all would go to the third
            prompt = [40 + number] * 40
            assert list((await it.generate(prompt=prompt)).choices[0].token_ids) == expected(8, prompt)
        for prefill, decode in zip(prefills, decodes, strict=False):
            pairs = {reserve.attempt_id for reserve in decode.reserves}
            assert pairs == {prefill.attempt_id for prefill in prefill.prefills}
        assert not decodes[2].reserves


async def test_the_other_host_takes_what_the_emptier_one_has_no_prefill_worker_free_for(model: Path) -> None:
    prefills = [FakeWorker(PREFILL, Script(silent=True), host="a"), FakeWorker(PREFILL, host="b")]
    decodes = [FakeWorker(DECODE, host="a"), FakeWorker(DECODE, host="b", num_blocks=130)]
    async with cluster(model, prefills, decodes) as it:
        workers = it.router.dispatcher.workers.of(PREFILL)
        next(worker for worker in workers if worker.host == "a").is_full()
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert not prefills[0].prefills


async def test_a_decode_worker_alone_on_its_host_prefills_itself_or_gets_nothing(model: Path) -> None:
    decodes = [FakeWorker(DECODE, host="b", prefill_tokens=1), FakeWorker(DECODE, host="c")]
    async with cluster(model, [FakeWorker(PREFILL, host="a")], decodes) as it:
        assert await health(it) == SERVING
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert [reserve.prefill for reserve in decodes[0].reserves] == [True]
        assert not it.prefills[0].prefills
        assert not decodes[1].reserves


async def test_without_a_pair_on_one_host_nobody_is_served(model: Path) -> None:
    async with cluster(model, [FakeWorker(PREFILL, host="a")], [FakeWorker(DECODE, host="b")]) as it:
        assert await health(it) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await it.generate()
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
        sentence = "no prefill worker is connected on a decode worker's host; it is safe to try again"
        assert failed.value.details() == sentence
        assert not it.prefills[0].prefills

        beside = FakeWorker(PREFILL, host="b")
        it.prefills.append(beside)
        it.router.registry._keep_link((await beside.start(), PREFILL))
        await eventually(lambda: it.router.dispatcher.workers.ready)
        assert list((await it.generate()).choices[0].token_ids) == expected(8)


async def test_a_pair_that_breaks_leaves_the_router_not_serving(model: Path) -> None:
    prefills = [FakeWorker(PREFILL, host=host) for host in ("a", "b")]
    async with cluster(model, prefills, [FakeWorker(DECODE, host="a")]) as it:
        assert await health(it) == SERVING
        await prefills[0].die()
        await eventually(lambda: not it.router.dispatcher.workers.ready)
        with pytest.raises(grpc.aio.AioRpcError, match="on a decode worker's host"):
            await it.generate()
