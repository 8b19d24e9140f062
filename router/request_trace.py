"""The attributes of the spans of calls and attempts. They are named by OpenTelemetry's conventions for RPCs and for
generative AI, where these have a name, and contain no text and no tokens."""

from collections.abc import Sequence

import grpc

from common.telemetry.tracing import Attributes, Span
from router.cluster.worker import Worker
from router.dispatch.request import Request
from router.validate import Job
from twostroke.v1 import inference_pb2 as pb

INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].full_name

# Codes with which a call's span is marked as failed: the fault is the service's, not the caller's.
FAILURES = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
}


def full_name(method: str) -> str:
    """Of a method of `Inference`."""
    return f"{INFERENCE}/{method}"


def of_call(method: str) -> Attributes:
    return {"rpc.system.name": "grpc", "rpc.method": method}


def of_request(request: pb.GenerateRequest, job: Job, model: str, prompt_tokens: int) -> Attributes:
    attributes: dict[str, str | int] = {
        "twostroke.request_id": job.request_id,
        "gen_ai.provider.name": "twostroke",
        "gen_ai.operation.name": "chat" if request.WhichOneof("input") == "chat" else "text_completion",
        "gen_ai.request.model": model,
        "gen_ai.request.choice.count": job.n,
        "gen_ai.usage.input_tokens": prompt_tokens,
    }
    if job.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = job.max_tokens
    return attributes


def of_answer(output_tokens: int, resumes: int, finishes: Sequence[pb.Finish]) -> Attributes:
    return {
        "gen_ai.usage.output_tokens": output_tokens,
        "gen_ai.response.finish_reasons": [finish_reason(finish) for finish in finishes],
        "twostroke.resumes": resumes,
    }


def finish_reason(finish: pb.Finish) -> str:
    return pb.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower()


def queued(request: Request) -> None:
    """Records the time that a request was queued. To be called when it leaves the queue."""
    request.trace.record("queued", request.queued_at, {"twostroke.choice": request.index})


def attempt(request: Request, prefill: Worker | None, decode: Worker | None) -> Span:
    attributes: dict[str, str | int] = {
        "twostroke.request_id": request.id,
        "twostroke.choice": request.index,
        "twostroke.attempt": request.attempts,
        "twostroke.input_tokens": request.length,
    }
    if prefill is not None:
        attributes["twostroke.prefill_worker"] = prefill.address
    if decode is not None:
        attributes["twostroke.decode_worker"] = decode.address
    return request.trace.child("attempt", attributes)
