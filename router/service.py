"""The gRPC services of a router: `Inference` for clients, `Registry` for workers."""

import asyncio
import itertools
import time
from array import array
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import grpc
import structlog

import twostroke
from common.model import hub_name
from common.model.model_config import ModelConfig
from common.security.cluster_secret import metadata_value
from common.telemetry.tracing import OFF, Span, Tracing
from router import request_trace, validate
from router.answers import tool_call
from router.answers.answer import Answer
from router.answers.answer_parser import AnswerParser
from router.callers.limits import CALLER
from router.callers.waiting_bytes import WaitingBytes
from router.cluster.registry import Registry
from router.cluster.worker import Worker
from router.config import RouterConfig
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.request import MAX_UNREAD_TOKENS, Prompt, Request
from router.errors import CallError, InvalidArgument
from router.grammars.guides import Guides, call_of
from router.grammars.tool_choice import must_call
from router.mailbox import Mailbox
from router.metrics import Metrics
from router.prompts import template_input
from router.prompts.tokenizer import Tokenized, Tokenizer
from router.turnstile import Turnstile
from router.validate import Job
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import inference_pb2_grpc, worker_pb2, worker_pb2_grpc

log = structlog.get_logger(__name__)

INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].full_name

# A caller may end a call at its deadline a little before the router's clock says that the deadline has passed.
DEADLINE_TOLERANCE = 0.05  # seconds

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
        metrics: Metrics,
        tracing: Tracing,
    ) -> None:
        self._config = config
        self._name = hub_name.public_name(config.model)
        self._model = model
        self._tokenizer = tokenizer
        self._guides = guides
        self._dispatcher = dispatcher
        self._registry = registry
        self._metrics = metrics
        self._tracing = tracing
        self._turnstile = Turnstile()
        self._waiting = WaitingBytes("too many messages wait for their guides to be compiled")
        self._serials = itertools.count()
        self._answered = 0

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

    @asynccontextmanager
    async def _generating(
        self, method: str, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[AsyncIterator[pb.GenerateChunk]]:
        mailbox: Mailbox[Request] = Mailbox(self._turnstile, asyncio.current_task())
        name = f"{INFERENCE}/{method}"
        traceparent = metadata_value(context.invocation_metadata(), "traceparent")
        trace = self._tracing.begin(name, str(traceparent), request_trace.of_call(name))
        async with (
            self._call(method, context, trace),
            aclosing(self._chunks(request, mailbox, trace)) as chunks,
        ):
            try:
                yield chunks
            except asyncio.CancelledError:
                if mailbox.overflown:
                    raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, UNREAD) from None
                raise

    async def _chunks(
        self, request: pb.GenerateRequest, mailbox: Mailbox[Request], trace: Span
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """The answer, at the reader's pace. Closing the generator, at whatever point, ends the request on the
        workers."""
        arrived_at = time.monotonic()
        validate.check_request_id(request.request_id)
        if request.request_id:  # the log line of a refusal has it, too
            structlog.contextvars.bind_contextvars(request_id=request.request_id)
        job = validate.check(request, self._model)
        structlog.contextvars.bind_contextvars(request_id=job.request_id)
        caller = CALLER.get()
        with caller.generating(job.n):
            self._dispatcher.check_admission(job.n)
            prompt, grammar = await self._prompt_and_grammar(request, job)
            prompt_tokens = len(prompt.token_ids)
            requests = self._requests(job, grammar, prompt.token_ids, mailbox, trace, arrived_at)
            trace.note(request_trace.of_request(request, job, self._name, prompt_tokens))
            answers = self._answers(request, job, prompt, requests)
            del prompt  # its tokens take ten times as much memory here as in the requests
            finishes: list[pb.Finish] = []
            self._dispatcher.submit(requests)
            try:
                self._metrics.prompt_tokens.inc(prompt_tokens)
                caller.spend(prompt_tokens)
                info = pb.PromptInfo(request_id=job.request_id, prompt_tokens=prompt_tokens, seed=job.seed)
                yield pb.GenerateChunk(prompt=info)
                while len(finishes) < job.n:
                    for choice in await mailbox.take():
                        choice.posted = False
                        answer = answers[choice.index]
                        if answer.over:
                            continue
                        delta, finish = answer.advance()
                        if answer.behind and finish is None:
                            choice.post()
                        # What came before a failure is given all the same, and may have ended the answer.
                        failure = choice.failure if finish is None and not answer.behind else None
                        if finish is not None:
                            self._dispatcher.drop([choice])
                            finishes.append(finish)
                            self._answered += 1
                            _log_finish(choice.index, finish)
                        if failure is None or delta.ByteSize():
                            yield pb.GenerateChunk(index=choice.index, delta=delta, finish=finish)
                        if failure is not None:
                            raise failure
            finally:
                self._dispatcher.drop(requests)
                mailbox.clear()
                output_tokens = sum(answer.tokens for answer in answers)
                self._metrics.output_tokens.inc(output_tokens)
                caller.spend(output_tokens)
                resumes = sum(choice.resumes for choice in requests)
                trace.note(request_trace.of_answer(output_tokens, resumes, finishes))

    async def _prompt_and_grammar(self, request: pb.GenerateRequest, job: Job) -> tuple[Tokenized, str]:
        """The prompt, and the grammar that its answers must follow; empty if there is none."""
        if job.guide is None and not job.must_call:
            return await self._prompt(request), ""
        # Any number of calls may wait for one guide, each with its message.
        with self._waiting.counted(CALLER.get().name, request.ByteSize()):
            grammar = await self._guides.grammar(job.guide) if job.guide is not None else ""
            prompt = await self._prompt(request)
            if job.must_call:
                grammar = await self._guides.call(request.chat, prompt)
        return prompt, grammar

    async def _prompt(self, request: pb.GenerateRequest) -> Tokenized:
        match request.WhichOneof("input"):
            case "text":
                prompt = Tokenized(await self._tokenizer.encode(request.text, add_special_tokens=True))
            case "chat":
                prompt = await self._tokenizer.encode_chat(request.chat)
            case _:
                validate.check_prompt(request.token_ids.ids, self._model)
                return Tokenized(list(request.token_ids.ids))
        # The tokenizer may know tokens that the model does not.
        validate.check_tokens("input", prompt.token_ids, self._model)
        return prompt

    def _answers(
        self, request: pb.GenerateRequest, job: Job, prompt: Tokenized, requests: Sequence[Request]
    ) -> list[Answer]:
        # The answer to a chat is a text of its own, a completion continues the prompt's text. With a guide every byte
        # that the grammar matched is kept.
        is_own_text = request.HasField("chat") or not self._tokenizer.spells(prompt.token_ids)
        begins_text = is_own_text and job.guide is None
        return [
            Answer(
                choice,
                job,
                self._tokenizer,
                self._model.eos_token_ids,
                self._metrics,
                begins_text,
                self._parser(choice, prompt) if job.parsed else None,
            )
            for choice in requests
        ]

    def _parser(self, choice: Request, prompt: Tokenized) -> AnswerParser:
        return AnswerParser(
            prompt.form,
            in_reasoning=prompt.opens_reasoning,
            tools=prompt.tools,
            new_id=partial(tool_call.make_id, choice.id, choice.sampling.seed),
        )

    def _requests(
        self,
        job: Job,
        grammar: str,
        token_ids: list[int],
        mailbox: Mailbox[Request],
        trace: Span,
        arrived_at: float,
    ) -> list[Request]:
        workers = self._dispatcher.workers
        check_length = partial(validate.check_length, len(token_ids), job, self._model)
        max_length = check_length(workers.max_length())
        prompt = Prompt(
            token_ids=array("I", token_ids),
            min_length=len(token_ids) + job.min_tokens,
            stop_token_ids=job.stop_token_ids,
            cache_salt=CALLER.get().cache_salt(job.cache_salt),
            grammar=grammar,
        )
        requests = []
        for index in range(job.n):
            sampling = worker_pb2.SamplingParams()
            sampling.CopyFrom(job.sampling)
            sampling.seed = (job.seed + index) % (validate.MAX_SEED + 1)
            requests.append(
                Request(
                    id=job.request_id,
                    index=index,
                    serial=next(self._serials),
                    prompt=prompt,
                    sampling=sampling,
                    mailbox=mailbox,
                    max_length=max_length,
                    recheck_length=None if workers.ready else check_length,
                    trace=trace,
                    arrived_at=arrived_at,
                )
            )
        return requests

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
        return response

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        async with self._call("GetLoad", context):
            usable = set(self._dispatcher.workers.usable())
            return pb.GetLoadResponse(
                queued=self._dispatcher.queued,
                running=self._dispatcher.running,
                workers=[_load(worker, worker in usable) for worker in self._registry.connected],
                answered=self._answered,
                problems=[
                    pb.WorkerProblem(address=address, role=role, reason=reason)
                    for address, role, reason in self._registry.problems()
                ],
            )

    # ------------------------------------------------------------ how calls end

    @asynccontextmanager
    async def _call(self, method: str, context: Context, trace: Span = OFF) -> AsyncIterator[None]:
        """Turns errors into status codes, and counts and logs how the call ended."""
        began, problem = time.monotonic(), ""
        code = grpc.StatusCode.CANCELLED
        try:
            yield
            code = grpc.StatusCode.OK
        except asyncio.CancelledError:
            left = context.time_remaining()
            if left is not None and left < DEADLINE_TOLERANCE:
                code, problem = grpc.StatusCode.DEADLINE_EXCEEDED, "the caller's deadline passed"
            raise
        except CallError as error:
            code, problem = error.code, error.message
            log.info("call failed", method=method, code=code.name, reason=error.message)
            await context.abort(code, error.message)
        except Exception:
            code, problem = grpc.StatusCode.INTERNAL, "a fault of the router"
            log.exception("call failed", method=method)
            await context.abort(code, "a fault of the router; its log says more")
        finally:
            self._metrics.calls.labels(method, code.name).inc()
            failed = problem if code in request_trace.FAILURES else ""
            trace.end({"rpc.response.status_code": code.name}, failed)
            if code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED):
                after_ms = round(1000 * (time.monotonic() - began))
                log.info("call cancelled", method=method, code=code.name, after_ms=after_ms)


class RegistryService(worker_pb2_grpc.RegistryServicer):
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def Register(self, request: worker_pb2.RegisterRequest, context: Context) -> worker_pb2.RegisterResponse:
        try:
            return self._registry.register(request)
        except InvalidArgument as error:
            await context.abort(error.code, error.message)


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


def _log_finish(index: int, finish: pb.Finish) -> None:
    log.info(
        "answered",
        choice=index,
        reason=request_trace.finish_reason(finish),
        prompt_tokens=finish.usage.prompt_tokens,
        completion_tokens=finish.usage.completion_tokens,
        resumes=finish.usage.resumes,
        first_token_ms=round(finish.timing.first_token_ms, 1),
        total_ms=round(finish.timing.total_ms, 1),
    )
