"""A router without a model: real gRPC on loopback, made-up tokens. For tests of what talks to a router."""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from common.probe import service_of_process
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import inference_pb2_grpc

SERVICE = "twostroke.v1.Inference"
DEFAULT_MAX_TOKENS = 4


@dataclass
class FakeRouter(inference_pb2_grpc.InferenceServicer):
    """Answers a prompt with "t0 t1 t2 ..." in deltas of `tokens_per_delta` tokens, `step_seconds` apart.

    The text "fail NAME" gets status NAME. A prompt's tokens are its characters, and it and its answer may have
    `longest` tokens. A parsed answer begins with a thought and a call. What was asked is kept for the test to look at.
    """

    step_seconds: float = 0.0
    tokens_per_delta: int = 1
    stalls_after: int | None = None  # tokens of an answer, of which no more come
    api_key: str | None = None
    longest: int = 1_000_000
    finish_reason: int = pb.FINISH_REASON_LENGTH
    load: pb.GetLoadResponse | None = None
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    deadlines: list[float | None] = field(default_factory=list)
    tokenize_requests: list[pb.TokenizeRequest] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    running: int = 0
    most_running: int = 0
    address: str = ""

    async def Generate(
        self, request: pb.GenerateRequest, context: "grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]"
    ) -> pb.GenerateResponse:
        response = pb.GenerateResponse(choices=[pb.Choice(index=index) for index in range(request.n or 1)])
        async for chunk in self._answer(request, context):
            if chunk.HasField("prompt"):
                response.prompt.CopyFrom(chunk.prompt)
            choice = response.choices[chunk.index]
            choice.text += chunk.delta.text
            choice.reasoning_content += chunk.delta.reasoning_content
            choice.tool_calls.extend(chunk.delta.tool_calls)
            choice.token_ids.extend(chunk.delta.token_ids)
            choice.logprobs.extend(chunk.delta.logprobs)
            if chunk.HasField("finish"):
                choice.finish.CopyFrom(chunk.finish)
        return response

    # A coroutine that writes: a generator that is cancelled while its message is being sent hears of it only when it is
    # collected.
    async def GenerateStream(  # type: ignore[override]
        self, request: pb.GenerateRequest, context: "grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateChunk]"
    ) -> None:
        async with aclosing(self._answer(request, context)) as chunks:
            async for chunk in chunks:
                await context.write(chunk)

    async def GenerateMany(  # type: ignore[override]
        self, messages: object, context: "grpc.aio.ServicerContext[pb.GenerateManyRequest, pb.GenerateManyResponse]"
    ) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "as an older router; those of tests/router can")

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: "grpc.aio.ServicerContext[pb.TokenizeRequest, pb.TokenizeResponse]"
    ) -> pb.TokenizeResponse:
        self.tokenize_requests.append(request)
        text = request.text or "".join(message.content for message in request.chat.messages)
        return pb.TokenizeResponse(token_ids=text.encode())

    async def Detokenize(
        self,
        request: pb.DetokenizeRequest,
        context: "grpc.aio.ServicerContext[pb.DetokenizeRequest, pb.DetokenizeResponse]",
    ) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=bytes(request.token_ids).decode())

    async def GetModel(
        self, request: pb.GetModelRequest, context: "grpc.aio.ServicerContext[pb.GetModelRequest, pb.GetModelResponse]"
    ) -> pb.GetModelResponse:
        limits = pb.Limits(max_total_tokens=self.longest)
        return pb.GetModelResponse(name="fake", vocab_size=256, context_length=2048, block_size=16, limits=limits)

    async def GetLoad(
        self, request: pb.GetLoadRequest, context: "grpc.aio.ServicerContext[pb.GetLoadRequest, pb.GetLoadResponse]"
    ) -> pb.GetLoadResponse:
        return self.load or pb.GetLoadResponse(running=self.running)

    async def _answer(
        self, request: pb.GenerateRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        self.requests.append(request)
        self.deadlines.append(context.time_remaining())
        if self.api_key is not None:
            metadata = dict(context.invocation_metadata() or ())
            if metadata.get("authorization") != f"Bearer {self.api_key}":
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the API key is wrong")
        if request.text.startswith("fail "):
            await context.abort(grpc.StatusCode[request.text.removeprefix("fail ")], "as you asked")
        text = request.text or "".join(message.content for message in request.chat.messages)
        prompt_tokens = len(request.token_ids.ids) or len(text)
        if prompt_tokens + (request.stopping.max_tokens or 1) > self.longest:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "it does not fit")
        self.begun.set()
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            prompt = pb.PromptInfo(request_id=request.request_id or "made-up", prompt_tokens=prompt_tokens, seed=7)
            yield pb.GenerateChunk(prompt=prompt)
            tokens = request.stopping.max_tokens or DEFAULT_MAX_TOKENS
            for index in range(request.n or 1):
                for first in range(0, tokens, self.tokens_per_delta):
                    await asyncio.sleep(3600 if first == self.stalls_after else self.step_seconds)
                    ids = range(first, min(first + self.tokens_per_delta, tokens))
                    delta = pb.Delta(text="".join(f"t{token} " for token in ids), token_ids=ids)
                    if request.response.parsed and first == 0:
                        delta.reasoning_content = "Hm."
                        delta.tool_calls.add(id="c1", name="weather", arguments='{"place": "Zürich", "days": [1, 2.0]}')
                    if request.response.HasField("logprobs"):
                        delta.logprobs.extend(pb.TokenLogprob(token_id=token, logprob=-1.0) for token in ids)
                    yield pb.GenerateChunk(index=index, delta=delta)
                usage = pb.Usage(prompt_tokens=prompt_tokens, completion_tokens=tokens)
                finish = pb.Finish(reason=self.finish_reason, usage=usage)  # type: ignore[arg-type]
                yield pb.GenerateChunk(index=index, finish=finish)
        except (asyncio.CancelledError, GeneratorExit):  # while it waited, or while its message was being sent
            self.cancelled.set()
            raise
        finally:
            self.running -= 1


@contextmanager
def serving(
    router: FakeRouter,
    *,
    listen: str = "127.0.0.1:0",
    tls: grpc.ServerCredentials | None = None,
    ready: threading.Event | None = None,
) -> Iterator[FakeRouter]:
    """Serves on a free port or at `listen`, on a thread of its own; `router.address` says where. With `ready` it is
    not ready before that is set."""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    started: Future[str] = Future()

    async def serve() -> None:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(router, server)
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_secure_port(listen, tls) if tls else server.add_insecure_port(listen)
        await servicer.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        await servicer.set(service_of_process(os.getpid()), health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        started.set_result(f"127.0.0.1:{port}")
        if ready is not None:
            await asyncio.to_thread(ready.wait)
        await servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        await stop.wait()
        await server.stop(grace=0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        router.address = started.result(timeout=10)
        yield router
    finally:
        if ready is not None:
            ready.set()
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=10)
        loop.close()
