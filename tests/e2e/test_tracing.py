"""A request through real processes is one trace: the router's spans in the caller's, and the workers' below those."""

import itertools
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from tests.collector import CALLER_SPAN_ID, QUICKLY, TRACE_ID, TRACEPARENT, Collector, collector
from tests.e2e.cluster import Cluster
from tests.e2e.tiny import prompt, tiny_cluster
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import inference_pb2_grpc

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

CALL = "twostroke.v1.Inference/Generate"
PHASES = {"reserved", "prefill", "transfer", "decode"}
# Prompts that lack no more in a cache are not handed over.
IN_PLACE_TOKENS = 3

SECRET_TEXT = "the quick brown fox"

_seeds = itertools.count(100)  # of prompts that no test asks


def wait_for_pairs(cluster: Cluster) -> None:
    """Until something was handed over to each decode worker. One that has not read the prefill worker's pool yet is
    ready, too, as it can prefill: it would get prompts that are to be handed over."""

    def handed_over() -> bool:
        cluster.client.generate(prompt(40, seed=next(_seeds)), max_tokens=2, ignore_eos=True)
        return all(worker.totals.prompt_tokens > worker.totals.prefilled_tokens for worker in cluster.workers("decode"))

    cluster.wait_for(handed_over)
    cluster.assert_blocks_home()


@pytest.fixture(scope="module")
def traces() -> Iterator[Collector]:
    with collector() as it:
        yield it


@pytest.fixture(scope="module")
def cluster(traces: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in QUICKLY.items():
            environment.setenv(name, value)
        endpoint = {"otlp-endpoint": traces.endpoint}
        with tiny_cluster(
            tmp_path_factory.mktemp("model"),
            endpoint,
            router_flags=endpoint,
            decode=2,
            decode_flags={"prefill-tokens": IN_PLACE_TOKENS},
        ) as it:
            wait_for_pairs(it)
            yield it


def ask(cluster: Cluster, request: pb.GenerateRequest, traceparent: str) -> pb.GenerateResponse:
    with grpc.insecure_channel(cluster.target) as channel:
        metadata = (("traceparent", traceparent),)
        call: Any = inference_pb2_grpc.InferenceStub(channel).Generate
        answer: pb.GenerateResponse = call(request, timeout=60, metadata=metadata)
        return answer


LAST = {"router": CALL, "prefill-worker": "prefill", "decode-worker": "decode"}


def wait_for(traces: Collector, trace_id: str) -> None:
    """Until the last span of every part has come."""
    traces.wait_for(lambda: all(traces.named(name, f"twostroke-{part}", trace_id) for part, name in LAST.items()))


def test_a_request_is_one_trace(cluster: Cluster, traces: Collector) -> None:
    tokens = 12
    request = pb.GenerateRequest(
        request_id="traced",
        text=SECRET_TEXT * 10,
        stopping=pb.Stopping(max_tokens=tokens, ignore_eos=True),
        sampling=pb.Sampling(temperature=0.0),
    )
    answer = ask(cluster, request, TRACEPARENT)
    wait_for(traces, TRACE_ID)

    (call,) = traces.named(CALL)
    assert call.parent_id == CALLER_SPAN_ID
    assert call.problem is None
    assert call.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": CALL,
        "rpc.response.status_code": "OK",
        "twostroke.request_id": "traced",
        "twostroke.resumes": 0,
        "gen_ai.provider.name": "twostroke",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": str(cluster.router_flags["model"]),
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": tokens,
        "gen_ai.usage.input_tokens": answer.prompt.prompt_tokens,
        "gen_ai.usage.output_tokens": tokens,
        "gen_ai.response.finish_reasons": ["length"],
    }

    (queued,) = traces.named("queued")
    (attempt,) = traces.named("attempt")
    assert queued.parent_id == attempt.parent_id == call.span_id
    assert attempt.attributes["twostroke.attempt"] == 1
    assert attempt.attributes["twostroke.request_id"] == "traced"
    assert attempt.attributes["twostroke.outcome"] == "finished"
    assert attempt.attributes["twostroke.prefill_worker"] in cluster.addresses("prefill").values()
    assert attempt.attributes["twostroke.decode_worker"] in cluster.addresses("decode").values()

    routers = {name: traces.named(name) for name in PHASES}
    assert all([span.parent_id for span in spans] == [attempt.span_id] for spans in routers.values())
    timing = answer.choices[0].finish.timing
    for name, spans in (*routers.items(), ("queued", [queued])):
        milliseconds = sum(span.end - span.start for span in spans) / 1e6
        assert milliseconds == pytest.approx(getattr(timing, f"{name}_ms"), abs=5), name

    (prefill,) = traces.named("prefill", "twostroke-prefill-worker")
    (transfer,) = traces.named("transfer", "twostroke-decode-worker")
    (decode,) = traces.named("decode", "twostroke-decode-worker")
    assert {span.parent_id for span in (prefill, transfer, decode)} == {attempt.span_id}
    assert prefill.attributes == {
        "twostroke.worker": attempt.attributes["twostroke.prefill_worker"],
        "twostroke.input_tokens": answer.prompt.prompt_tokens,
        "twostroke.cached_tokens": 0,
        "twostroke.loaded_tokens": 0,
    }
    assert transfer.attributes["twostroke.worker"] == attempt.attributes["twostroke.decode_worker"]
    assert transfer.attributes["twostroke.blocks"] == -(-answer.prompt.prompt_tokens // 16)
    assert decode.attributes["twostroke.output_tokens"] == tokens - 1
    assert prefill.end <= transfer.start + 1e6
    assert transfer.end <= decode.end

    sent = b"".join(traces.raw)
    assert SECRET_TEXT.encode() not in sent
    assert answer.choices[0].text.encode() not in sent
    cluster.assert_blocks_home()


def test_a_request_without_a_hand_over_has_no_prefill_worker_in_its_trace(cluster: Cluster, traces: Collector) -> None:
    trace_id = "5" * 32
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt(IN_PLACE_TOKENS)))
    request.stopping.MergeFrom(pb.Stopping(max_tokens=4, ignore_eos=True))
    ask(cluster, request, f"00-{trace_id}-{CALLER_SPAN_ID}-01")
    traces.wait_for(lambda: bool(traces.named("decode", "twostroke-decode-worker", trace_id)))
    traces.wait_for(lambda: bool(traces.named(CALL, trace_id=trace_id)))
    spans = {(span.service.removeprefix("twostroke-"), span.name) for span in traces.of_trace(trace_id)}
    router = {("router", name) for name in (CALL, "queued", "attempt", "reserved", "prefill", "decode")}
    assert spans == router | {("decode-worker", "prefill"), ("decode-worker", "decode")}
    (attempt,) = traces.named("attempt", trace_id=trace_id)
    (prefill,) = traces.named("prefill", "twostroke-decode-worker", trace_id)
    assert prefill.parent_id == attempt.span_id
    assert prefill.attributes["twostroke.input_tokens"] == IN_PLACE_TOKENS
    assert prefill.attributes["twostroke.worker"] == attempt.attributes["twostroke.decode_worker"]
    assert "twostroke.prefill_worker" not in attempt.attributes
    cluster.assert_blocks_home()


def test_a_caller_without_a_trace_gets_a_new_one(cluster: Cluster, traces: Collector) -> None:
    request = pb.GenerateRequest(request_id="untraced", token_ids=pb.TokenIds(ids=prompt(20)))
    request.stopping.max_tokens = 3
    ask(cluster, request, "no traceparent at all")
    traces.wait_for(lambda: any(span.attributes.get("twostroke.request_id") == "untraced" for span in traces.spans))
    (trace_id,) = {s.trace_id for s in traces.spans if s.attributes.get("twostroke.request_id") == "untraced"}
    wait_for(traces, trace_id)
    (call,) = traces.named(CALL, trace_id=trace_id)
    assert call.parent_id == ""
    assert trace_id != TRACE_ID


def test_a_trace_that_is_not_sampled_is_not_sent(cluster: Cluster, traces: Collector) -> None:
    unsampled = "1" * 32
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt(20)), stopping=pb.Stopping(max_tokens=3))
    ask(cluster, request, f"00-{unsampled}-{CALLER_SPAN_ID}-00")
    sampled = "2" * 32
    ask(cluster, request, f"00-{sampled}-{CALLER_SPAN_ID}-01")
    wait_for(traces, sampled)
    assert not traces.of_trace(unsampled)


def test_a_killed_worker_is_a_failed_attempt_and_a_second_one(cluster: Cluster, traces: Collector) -> None:
    trace_id = "3" * 32
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt(40)), sampling=pb.Sampling(temperature=0.0))
    request.stopping.MergeFrom(pb.Stopping(max_tokens=1_500, ignore_eos=True))

    def busy() -> list[str]:
        working = {worker.address for worker in cluster.workers("decode") if worker.running}
        return [name for name, address in cluster.addresses("decode").items() if address in working]

    cluster.wait_for(lambda: not busy())  # what the last test asked for may still be reported
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, cluster, request, f"00-{trace_id}-{CALLER_SPAN_ID}-01")
        cluster.wait_for(lambda: bool(busy()))
        (name,) = busy()
        cluster.kill(name)
        answer = asked.result()
    assert answer.choices[0].finish.usage.resumes == 1
    assert len(answer.choices[0].token_ids) == 1_500
    wait_for(traces, trace_id)

    first, second = traces.named("attempt", trace_id=trace_id)
    assert (first.attributes["twostroke.attempt"], second.attributes["twostroke.attempt"]) == (1, 2)
    assert first.problem is not None
    assert first.problem.startswith(f"worker lost ({cluster.addresses('decode')[name]})")
    assert second.problem is None
    assert second.attributes["twostroke.decode_worker"] != first.attributes["twostroke.decode_worker"]
    generated = [span.attributes["twostroke.output_tokens"] for span in (first, second)]
    assert sum(generated) == 1_500
    assert second.attributes["twostroke.input_tokens"] == 40 + generated[0]
    (call,) = traces.named(CALL, trace_id=trace_id)
    assert call.problem is None
    assert call.attributes["twostroke.resumes"] == 1
    assert len(traces.named("queued", trace_id=trace_id)) == 2

    cluster.start_worker("decode", int(name.rpartition("-")[2]))
    cluster.wait_until_ready()
    wait_for_pairs(cluster)


def test_the_last_spans_are_sent_when_a_worker_stops(cluster: Cluster, traces: Collector) -> None:
    trace_id = "4" * 32
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt(30)), stopping=pb.Stopping(max_tokens=3))
    ask(cluster, request, f"00-{trace_id}-{CALLER_SPAN_ID}-01")
    for name in cluster.processes:
        cluster.signal(name, signal.SIGTERM)
    for process in cluster.processes.values():
        assert process.wait(timeout=60) == 0
    wait_for(traces, trace_id)
