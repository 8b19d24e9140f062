"""What the router's spans say of requests that go wrong; the workers' are in tests/e2e/test_tracing.py."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.collector import QUICKLY, TRACEPARENT, Collector, Span, collector
from tests.router.cluster import Cluster, cluster, eventually, expected, request
from tests.router.fake_worker import Ended, Script
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import worker_pb2

CALL = "twostroke.v1.Inference/Generate"
METADATA = (("traceparent", TRACEPARENT),)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    for name, value in QUICKLY.items():
        monkeypatch.setenv(name, value)
    with collector() as it:
        yield it


async def ask(it: Cluster, **fields: Any) -> pb.GenerateResponse:
    answer: pb.GenerateResponse = await it.stub.Generate(request(**fields), timeout=10, metadata=METADATA)
    return answer


async def failing(it: Cluster, **fields: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await ask(it, **fields)
    return failed.value


def traceparents(it: Cluster) -> list[str]:
    """Those that the workers were told of."""
    told: list[worker_pb2.Prefill | worker_pb2.Reserve] = [*it.prefills[0].prefills, *it.decodes[0].reserves]
    return [message.traceparent for message in told]


async def the_call(traces: Collector) -> Span:
    await eventually(lambda: bool(traces.named(CALL)))
    (call,) = traces.named(CALL)
    return call


def outcomes(traces: Collector) -> list[tuple[int, str, str | None]]:
    return [
        (span.attributes["twostroke.attempt"], span.attributes["twostroke.outcome"], span.problem)
        for span in traces.named("attempt")
    ]


async def test_a_resumed_request_has_two_attempts(model: Path, traces: Collector) -> None:
    fails = Script(end_after={3: [Ended.CAUSE_FAILED]})
    async with cluster(model, decodes=[fails], otlp_endpoint=traces.endpoint) as it:
        assert list((await ask(it)).choices[0].token_ids) == expected(8)
        call = await the_call(traces)
        address = it.decodes[0].address
        sent = traceparents(it)
    assert outcomes(traces) == [(1, "failed", f"failed ({address}) scripted"), (2, "finished", None)]
    assert [span.attributes["twostroke.output_tokens"] for span in traces.named("attempt")] == [4, 4]
    assert {span.parent_id for span in traces.named("attempt")} == {call.span_id}
    assert call.problem is None
    assert call.attributes["twostroke.resumes"] == 1
    # Workers are told the span of the attempt, each attempt's own.
    first, second = (f"00-{span.trace_id}-{span.span_id}-01" for span in traces.named("attempt"))
    assert sent == [first, second, first, second]
    for phase in ("reserved", "prefill", "transfer", "decode"):
        parents = [span.parent_id for span in traces.named(phase)]
        assert parents == [span.span_id for span in traces.named("attempt")]
    assert len(traces.named("queued")) == 2


async def test_preemption_and_refusal_are_no_errors(model: Path, traces: Collector) -> None:
    busy = Script(refuse=1, end_after={3: [Ended.CAUSE_PREEMPTED]})
    async with cluster(model, decodes=[busy], otlp_endpoint=traces.endpoint) as it:
        await ask(it)
        await the_call(traces)
    assert outcomes(traces) == [(1, "refused", None), (2, "preempted", None), (3, "finished", None)]


async def test_what_is_given_up_is_an_error(model: Path, traces: Collector) -> None:
    async with cluster(model, prefills=[Script(fail=2)], otlp_endpoint=traces.endpoint, max_resumes=1) as it:
        error = await failing(it)
        call = await the_call(traces)
        assert (await it.generate()).choices
    assert call.attributes["rpc.response.status_code"] == "UNAVAILABLE"
    assert call.problem == error.details()
    assert [outcome for _, outcome, _ in outcomes(traces)] == ["failed", "failed"]


async def test_a_callers_mistake_is_not_an_error_of_the_router(model: Path, traces: Collector) -> None:
    async with cluster(model, otlp_endpoint=traces.endpoint) as it:
        assert (await failing(it, n=1000)).code() == grpc.StatusCode.INVALID_ARGUMENT
        call = await the_call(traces)
    assert call.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert call.problem is None


async def test_a_wait_in_vain_is_in_the_trace(model: Path, traces: Collector) -> None:
    async with cluster(model, prefills=[], ready=False, otlp_endpoint=traces.endpoint, worker_grace=0.3) as it:
        assert (await failing(it)).code() == grpc.StatusCode.UNAVAILABLE
        call = await the_call(traces)
    assert call.problem == "no prefill worker is connected; it is safe to try again"
    (queued,) = traces.named("queued")
    assert queued.end - queued.start > 0.1e9
    assert not traces.named("attempt")


async def test_a_cancelled_request_is_traced_to_its_end(model: Path, traces: Collector) -> None:
    async with cluster(model, decodes=[Script(stop_after=3)], otlp_endpoint=traces.endpoint) as it:
        call = it.stub.Generate(request(max_tokens=100), metadata=METADATA)
        await eventually(lambda: any(running.steps == 3 for running in it.decodes[0].running.values()))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        span = await the_call(traces)
    assert span.attributes["rpc.response.status_code"] == "CANCELLED"
    assert span.problem is None
    assert outcomes(traces) == [(1, "dropped", None)]
    assert len(traces.named("decode")) == 1


async def test_a_deadline_that_passes_is_an_error(model: Path, traces: Collector) -> None:
    async with cluster(model, decodes=[Script(silent=True)], otlp_endpoint=traces.endpoint) as it:
        with pytest.raises(grpc.aio.AioRpcError):
            await it.stub.Generate(request(), timeout=1, metadata=METADATA)
        span = await the_call(traces)
    assert span.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
    assert span.problem == "the caller's deadline passed"
    assert outcomes(traces) == [(1, "dropped", None)]


async def test_choices_share_a_span_and_have_attempts_of_their_own(model: Path, traces: Collector) -> None:
    async with cluster(model, otlp_endpoint=traces.endpoint) as it:
        await ask(it, n=3)
        call = await the_call(traces)
    assert call.attributes["gen_ai.request.choice.count"] == 3
    assert call.attributes["gen_ai.usage.output_tokens"] == 24
    assert call.attributes["gen_ai.response.finish_reasons"] == ["length"] * 3
    attempts = [span for span in traces.named("attempt") if span.parent_id == call.span_id]
    assert sorted(span.attributes["twostroke.choice"] for span in attempts) == [0, 1, 2]


async def test_without_an_endpoint_workers_are_told_of_no_span(model: Path) -> None:
    async with cluster(model) as it:
        await ask(it)
        assert traceparents(it) == ["", ""]


async def test_a_collector_that_is_gone_holds_up_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUICKLY.items():
        monkeypatch.setenv(name, value)
    began = asyncio.get_running_loop().time()
    async with cluster(model, otlp_endpoint="http://127.0.0.1:1") as it:
        for _ in range(20):
            assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert asyncio.get_running_loop().time() - began < 5
        stopping = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - stopping < 8
