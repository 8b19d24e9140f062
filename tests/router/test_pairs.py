"""A pair is of one host, as KV does not leave it, and of a decode worker that has read the other's pool."""

import asyncio
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from router.cluster import workers
from tests import health
from tests.router.cluster import Cluster, cluster, eventually, expected
from tests.router.fake_worker import DECODE, PREFILL, FakeWorker, Script
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import worker_pb2

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def counted(it: Cluster) -> tuple[float | None, ...]:
    """Prefill and decode workers that take requests, as operators see them and are alerted by them."""
    value = it.router.metrics.registry.get_sample_value
    return tuple(value("twostroke_workers", {"role": role}) for role in ("prefill", "decode"))


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
        connected = it.router.dispatcher.workers.of(PREFILL)
        next(worker for worker in connected if worker.host == "a").note_refusal()
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert not prefills[0].prefills


async def test_a_decode_worker_alone_on_its_host_prefills_itself_or_gets_nothing(model: Path) -> None:
    decodes = [FakeWorker(DECODE, host="b", prefill_tokens=1), FakeWorker(DECODE, host="c")]
    async with cluster(model, [FakeWorker(PREFILL, host="a")], decodes) as it:
        assert await health.check(it.channel) == SERVING
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert [reserve.prefill for reserve in decodes[0].reserves] == [True]
        assert not it.prefills[0].prefills
        assert not decodes[1].reserves


async def test_without_a_pair_on_one_host_nobody_is_served(model: Path) -> None:
    async with cluster(model, [FakeWorker(PREFILL, host="a")], [FakeWorker(DECODE, host="b")]) as it:
        assert await health.check(it.channel) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await it.generate()
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
        sentence = "no prefill worker is connected on a decode worker's host; it is safe to try again"
        assert failed.value.details() == sentence
        assert not it.prefills[0].prefills
        assert counted(it) == (0, 0)

        beside = FakeWorker(PREFILL, host="b")
        it.prefills.append(beside)
        it.router.registry._keep_link((await beside.start(), PREFILL))
        await eventually(lambda: it.router.dispatcher.workers.ready)
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert counted(it) == (1, 1)  # one prefill worker is as useless as before


async def test_a_pair_that_breaks_leaves_the_router_not_serving(model: Path) -> None:
    prefills = [FakeWorker(PREFILL, host=host) for host in ("a", "b")]
    async with cluster(model, prefills, [FakeWorker(DECODE, host="a")]) as it:
        assert await health.check(it.channel) == SERVING
        await prefills[0].die()
        await eventually(lambda: not it.router.dispatcher.workers.ready)
        with pytest.raises(grpc.aio.AioRpcError, match="on a decode worker's host"):
            await it.generate()


PROBLEM = "containers of one host need ipc: host"


async def test_workers_of_which_one_cannot_read_the_other_serve_nobody_until_it_can(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "ASK_AGAIN_SECONDS", 0.05)
    prefill = FakeWorker(PREFILL)
    decode = FakeWorker(DECODE, Script(unreadable={prefill.instance: PROBLEM}))
    async with cluster(model, [prefill], [decode]) as it:
        assert await health.check(it.channel) == NOT_SERVING
        load = await it.stub.GetLoad(pb.GetLoadRequest())
        assert [worker.ready for worker in load.workers] == [False, False]
        reason = f"cannot read the KV of a prefill worker: {PROBLEM}"
        assert list(load.problems) == [pb.WorkerProblem(address=decode.address, role=DECODE, reason=reason)]
        await eventually(lambda: it.router.dispatcher.workers.gone() is not None)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await it.generate()
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
        assert failed.value.details() == (
            f"decode worker {decode.address} cannot read the KV of a prefill worker: {PROBLEM}; it is safe to try again"
        )
        assert not prefill.prefills
        assert not decode.reserves

        await eventually(lambda: len(decode.pools) > 2)  # it is asked again and again
        decode.script.unreadable.clear()
        await eventually(lambda: it.router.dispatcher.workers.ready)
        assert await health.check(it.channel) == SERVING
        load = await it.stub.GetLoad(pb.GetLoadRequest())
        assert not load.problems
        assert [worker.ready for worker in load.workers] == [True, True]
        assert list((await it.generate()).choices[0].token_ids) == expected(8)


async def test_each_decode_worker_has_its_prompts_computed_where_it_can_read_them(model: Path) -> None:
    prefills = [FakeWorker(PREFILL), FakeWorker(PREFILL)]
    decodes = [
        FakeWorker(DECODE, Script(unreadable={prefill.instance: PROBLEM}, step_seconds=0.02)) for prefill in prefills
    ]
    async with cluster(model, prefills, decodes) as it:
        prompts = [[40 + number] * 40 for number in range(8)]
        answers = await asyncio.gather(*(it.generate(prompt=prompt) for prompt in prompts))
        assert [list(answer.choices[0].token_ids) for answer in answers] == [expected(8, prompt) for prompt in prompts]
        for prefill, decode in zip(prefills, reversed(decodes), strict=True):
            assert {reserve.attempt_id for reserve in decode.reserves} == {sent.attempt_id for sent in prefill.prefills}
        assert len(prefills[0].prefills) == len(prefills[1].prefills) == 4


async def test_a_decode_worker_that_reads_nobody_gets_only_what_it_prefills_itself(model: Path) -> None:
    prefill = FakeWorker(PREFILL)
    decode = FakeWorker(DECODE, Script(unreadable={prefill.instance: PROBLEM}), prefill_tokens=1)
    async with cluster(model, [prefill], [decode]) as it:
        assert await health.check(it.channel) == SERVING
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert [reserve.prefill for reserve in decode.reserves] == [True]
        assert not prefill.prefills


async def test_a_decode_worker_that_does_not_say_is_no_pair(model: Path) -> None:
    decodes = [FakeWorker(DECODE, Script(silent_of_pools=True)), FakeWorker(DECODE, num_blocks=130)]
    async with cluster(model, decodes=decodes, ready=False) as it:
        await eventually(lambda: it.router.dispatcher.workers.ready and bool(decodes[0].pools))
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert not decodes[0].reserves


async def test_a_worker_that_takes_work_again_has_no_problem_with_one_that_left_meanwhile(model: Path) -> None:
    prefills = [FakeWorker(PREFILL), FakeWorker(PREFILL)]
    broken = Script(unreadable={prefills[0].instance: "no such file"})
    async with cluster(model, prefills, [broken]) as it:
        decode = it.decodes[0]
        assert len((await it.stub.GetLoad(pb.GetLoadRequest())).problems) == 1
        decode.ready = False
        await eventually(lambda: not it.router.dispatcher.workers.of(DECODE))
        await prefills[0].die()
        it.prefills.remove(prefills[0])
        await eventually(lambda: len(it.router.dispatcher.workers.of(PREFILL)) == 1)
        decode.ready = True
        await eventually(it.introduced)
        assert not (await it.stub.GetLoad(pb.GetLoadRequest())).problems


async def test_what_is_said_of_a_pool_counts_for_as_long_as_its_worker_takes_work(model: Path) -> None:
    async with cluster(model) as it:
        prefill, decode = it.prefills[0], it.decodes[0]
        prefill.ready = False
        await eventually(lambda: not it.router.dispatcher.workers.ready)
        decode.send(opened=[worker_pb2.PoolOpened(instance=name) for name in (prefill.instance, "nobody")])
        await it.stub.GetLoad(pb.GetLoadRequest())
        assert not it.router.dispatcher.workers.ready
        prefill.ready = True
        await eventually(lambda: it.router.dispatcher.workers.ready)
        assert [pool.instance for pool in decode.pools] == [prefill.instance] * 2
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
