"""The gRPC services of a router: `Inference` for clients, `Registry` for workers."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import grpc
import structlog

import twostroke
from common.model import hub_name
from common.model.model_config import ModelConfig
from common.security.cluster_secret import metadata_value
from common.telemetry.tracing import OFF, Span, Tracing
from router import request_trace, validate
from router.accounting import accounted
from router.cluster.registry import Registry
from router.cluster.worker import Worker
from router.config import RouterConfig
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.request import MAX_UNREAD_TOKENS, Request
from router.dispatch.settled import Settled
from router.errors import CallError, Exhausted, InvalidArgument
from router.generation import Generator
from router.grammars.guides import Guides, call_of
from router.grammars.tool_choice import must_call
from router.mailbox import Mailbox
from router.many import MANY, Item, Many
from router.metrics import Metrics
from router.prompts import template_input
from router.prompts.tokenizer import Tokenizer
from router.turnstile import Turnstile
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import inference_pb2_grpc, worker_pb2, worker_pb2_grpc

log = structlog.get_logger(__name__)

# Calls of GenerateMany that may be open, of one host and of all.
MOST_OPEN_OF_A_HOST = 64
MOST_OPEN = 4 * MOST_OPEN_OF_A_HOST

UNREAD = f"the stream was not read: more than {MAX_UNREAD_TOKENS} tokens of an answer waited for it"

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    def __init__(
        self,
        config: RouterConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        guides: Guides,
        dispatcher: Dispatcher,
        registry: Registry,
        settled: Settled,
        metrics: Metrics,
        tracing: Tracing,
    ) -> None:
        self._config = config
        self._name = hub_name.public_name(config.model)
        self._model = model
        self._tokenizer = tokenizer
        self._dispatcher = dispatcher
        self._registry = registry
        self._settled = settled
        self._metrics = metrics
        self._tracing = tracing
        self._turnstile = Turnstile()
        self._open: Counter[str] = Counter()  # calls of GenerateMany, by their caller's host
        self._many: set[Many] = set()
        self._draining = False
        self.calls = 0  # under way
        self._generator = Generator(config, model, tokenizer, guides, dispatcher, metrics)

    # ------------------------------------------------------------ generating

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        async with self._generating("Generate", request, context) as chunks:
            return await gather(chunks)

    # A coroutine that writes, though the stubs know only generators. gRPC does not close a generator whose call is
    # cancelled while a message is being sent: what it holds would be released only when it is garbage-collected.
    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        async with self._generating("GenerateStream", request, context) as chunks:
            async for chunk in chunks:
                await context.write(chunk)

    async def GenerateMany(  # type: ignore[override]
        self, messages: AsyncIterator[pb.GenerateManyRequest], context: Context
    ) -> None:
        async with self._call(MANY, context):
            with self._counted(context.peer().rpartition(":")[0]):
                mailbox: Mailbox[Item] = Mailbox(self._turnstile, asyncio.current_task())
                many = Many(self._generator, self._settled, self._metrics, self._tracing, mailbox)
                self._many.add(many)
                if self._draining:
                    many.drain()
                try:
                    with _told_if_unread(mailbox):
                        await many.run(messages, context.write)
                finally:
                    self._many.remove(many)

    @contextmanager
    def _counted(self, host: str) -> Iterator[None]:
        """gRPC holds what has come of a message, and such a call may take any time to send the rest of one.

        Raises:
            Exhausted: too many such calls are open.
        """
        if self._open[host] >= MOST_OPEN_OF_A_HOST or self._open.total() >= MOST_OPEN:
            raise Exhausted(f"too many calls of {MANY} are open; one can have any number of requests")
        self._open[host] += 1
        try:
            yield
        finally:
            self._open[host] -= 1
            self._open += Counter()  # forgets hosts that have none

    def drain(self) -> None:
        """Lets calls that stay open for further requests end once they have none."""
        self._draining = True
        for many in self._many:
            many.drain()

    @asynccontextmanager
    async def _generating(
        self, method: str, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[AsyncIterator[pb.GenerateChunk]]:
        mailbox: Mailbox[Request] = Mailbox(self._turnstile, asyncio.current_task())
        name = request_trace.full_name(method)
        traceparent = metadata_value(context.invocation_metadata(), "traceparent")
        trace = self._tracing.begin(name, str(traceparent), request_trace.of_call(name))
        async with (
            self._call(method, context, trace),
            aclosing(self._chunks(request, mailbox, trace)) as chunks,
        ):
            with _told_if_unread(mailbox):
                yield chunks

    async def _chunks(
        self, request: pb.GenerateRequest, mailbox: Mailbox[Request], trace: Span
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """The answer, at the reader's pace. Closing the generator, at whatever point, ends the request on the
        workers."""
        async with self._generator.begin(request, mailbox, trace) as generation:
            try:
                yield generation.prompt
                while not generation.over:
                    for choice in await mailbox.take():
                        if (news := generation.take(choice)) is not None:
                            chunk = pb.GenerateChunk()
                            generation.write(choice, news, chunk)
                            yield chunk
                        if generation.failure is not None:
                            raise generation.failure
            finally:
                mailbox.clear()

    # ------------------------------------------------------------ tokens

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with self._call("Tokenize", context):
            match request.WhichOneof("input"):
                case "text":
                    special = request.add_special_tokens if request.HasField("add_special_tokens") else True
                    token_ids = await self._tokenizer.encode(request.text, add_special_tokens=special)
                case "chat":
                    template_input.check_sizes(request.chat)
                    prompt = await self._tokenizer.encode_chat(request.chat)
                    if must_call(request.chat):
                        call_of(request.chat, prompt)  # what could not be generated is refused here, too
                    token_ids = prompt.token_ids
                case _:
                    raise InvalidArgument("input", "one of text and chat must be set")
            return pb.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        async with self._call("Detokenize", context):
            validate.check_detokenize(request.token_ids, self._model)
            text = self._tokenizer.decode(request.token_ids, special_tokens=request.special_tokens)
            return pb.DetokenizeResponse(text=text)

    # ------------------------------------------------------------ about the cluster

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        async with self._call("GetModel", context):
            return self._described()

    def _described(self) -> pb.GetModelResponse:
        model, dispatcher = self._model, self._dispatcher
        longest = min(model.context_length, dispatcher.workers.max_length() or model.context_length)
        response = pb.GetModelResponse(
            name=self._name,
            architecture=model.architecture,
            context_length=model.context_length,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            limits=pb.Limits(
                max_prompt_tokens=longest - 1,
                max_total_tokens=longest,
                max_queue=self._config.max_queue,
                max_n=min(validate.MAX_N, self._config.max_queue),
                max_logprobs=validate.MAX_LOGPROBS,
                max_stop_strings=validate.MAX_STOP_STRINGS,
                max_stop_tokens=validate.MAX_STOP_TOKENS,
                max_logit_bias=validate.MAX_LOGIT_BIAS,
                max_message_bytes=validate.MAX_MESSAGE_BYTES,
            ),
            version=twostroke.__version__,
        )
        if (worker := dispatcher.workers.any()) is not None:
            response.dtype = worker.hello.dtype
            response.block_size = worker.hello.pool.layout.block_size
            response.fingerprint = worker.hello.fingerprint
            response.kv_cache_dtype = worker.hello.pool.layout.dtype
        return response

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        async with self._call("GetLoad", context):
            usable = set(self._dispatcher.workers.usable())
            return pb.GetLoadResponse(
                queued=self._dispatcher.queued,
                running=self._dispatcher.running,
                workers=[_load(worker, worker in usable) for worker in self._registry.connected],
                answered=self._generator.answered,
                problems=[
                    pb.WorkerProblem(address=address, role=role, reason=reason)
                    for address, role, reason in self._registry.problems()
                ],
            )

    # ------------------------------------------------------------ how calls end

    @asynccontextmanager
    async def _call(self, method: str, context: Context, trace: Span = OFF) -> AsyncIterator[None]:
        self.calls += 1
        try:
            async with accounted(self._metrics, method, trace, context.time_remaining):
                yield
        except CallError as error:
            await context.abort(error.code, error.message)
        finally:
            self.calls -= 1


class RegistryService(worker_pb2_grpc.RegistryServicer):
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def Register(self, request: worker_pb2.RegisterRequest, context: Context) -> worker_pb2.RegisterResponse:
        try:
            return self._registry.register(request)
        except InvalidArgument as error:
            await context.abort(error.code, error.message)


@contextmanager
def _told_if_unread(mailbox: Mailbox[Any]) -> Iterator[None]:
    """
    Raises:
        CallError: in place of the cancel with which the mailbox ends its reader.
    """
    try:
        yield
    except asyncio.CancelledError:
        if mailbox.overflown:
            raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, UNREAD) from None
        raise


async def gather(chunks: AsyncIterator[pb.GenerateChunk]) -> pb.GenerateResponse:
    """Puts the chunks of a stream together into one response."""
    response = pb.GenerateResponse()
    texts: defaultdict[int, list[str]] = defaultdict(list)
    reasoning: defaultdict[int, list[str]] = defaultdict(list)
    async for chunk in chunks:
        if chunk.HasField("prompt"):
            response.prompt.CopyFrom(chunk.prompt)
            continue
        while len(response.choices) <= chunk.index:
            response.choices.add(index=len(response.choices))
        choice = response.choices[chunk.index]
        texts[chunk.index].append(chunk.delta.text)
        reasoning[chunk.index].append(chunk.delta.reasoning_content)
        choice.tool_calls.extend(chunk.delta.tool_calls)
        choice.token_ids.extend(chunk.delta.token_ids)
        choice.logprobs.extend(chunk.delta.logprobs)
        if chunk.HasField("finish"):
            choice.finish.CopyFrom(chunk.finish)
    for index, pieces in texts.items():
        # Set once: a message keeps every value that a string field has had until it is freed, so appending piece by
        # piece would take memory that is quadratic in the text's length.
        response.choices[index].text = "".join(pieces)
        response.choices[index].reasoning_content = "".join(reasoning[index])
    return response


def _load(worker: Worker, ready: bool) -> pb.WorkerLoad:
    load = pb.WorkerLoad()
    load.CopyFrom(worker.load)
    load.address, load.instance, load.role, load.ready = worker.address, worker.instance, worker.role, ready
    return load
