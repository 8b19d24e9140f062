"""A request under way: from its message, by a prompt and requests to workers, to the chunks of its answers."""

import itertools
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import structlog

from common.model import hub_name
from common.model.model_config import ModelConfig
from common.telemetry.tracing import Span
from router import request_trace, validate
from router.answers import tool_call
from router.answers.answer import Answer, News
from router.answers.answer_parser import AnswerParser
from router.callers.limits import CALLER
from router.callers.waiting_bytes import WaitingBytes
from router.config import RouterConfig
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.request import Prompt, Request
from router.errors import CallError
from router.grammars.guides import Guides
from router.mailbox import Mailbox
from router.metrics import Metrics
from router.prompts.tokenizer import Tokenized, Tokenizer
from router.validate import Job
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import worker_pb2

log = structlog.get_logger(__name__)


class Generation:
    """What workers compute for one request, and what its caller gets of it.

    Args:
        ended: called with each choice whose answer is over.

    Attributes:
        choices: each is posted to the mailbox it was made with, when there is news of it.
        prompt: the first chunk.
        plain: there is one choice, whose deltas are text, and token ids if the caller wants these, alone.
        want_token_ids: the caller gets token ids beside the text.
        over: nothing comes any more.
        failure: what it ends with instead of its finishes. What came before it is given all the same.
    """

    __slots__ = ("_answers", "_ended", "choices", "failure", "finishes", "over", "plain", "prompt", "want_token_ids")

    def __init__(
        self,
        job: Job,
        choices: Sequence[Request],
        answers: Sequence[Answer],
        prompt_tokens: int,
        ended: Callable[[Request], None],
    ) -> None:
        self.choices = choices
        self.prompt = pb.GenerateChunk(
            prompt=pb.PromptInfo(request_id=job.request_id, prompt_tokens=prompt_tokens, seed=job.seed)
        )
        self.plain = len(choices) == 1 and job.logprobs is None and not job.parsed
        self.over = False
        self.failure: CallError | None = None
        self.finishes: list[pb.Finish] = []
        self.want_token_ids = job.want_token_ids
        self._answers = tuple(answers)
        self._ended = ended

    @property
    def output_tokens(self) -> int:
        return sum(choice.taken for choice in self.choices)

    def take(self, choice: Request) -> News | None:
        """What came next of a choice that was posted; None: there is nothing to send."""
        choice.posted = False
        answer = self._answers[choice.index]
        if answer.over:
            return None
        news = text, tokens, finish = answer.take()
        if finish is not None:
            self.finishes.append(finish)
            self.over = len(self.finishes) == len(self.choices)
            self._ended(choice)
            _log_finish(choice, finish)
        elif answer.behind:
            choice.post()
        elif choice.failure is not None:  # what came before it is given all the same, and may have ended the answer
            self.failure, self.over = choice.failure, True
            return news if tokens or text else None
        return news

    def takes_words(self, choice: Request) -> bool:
        """See `Answer.takes_words`."""
        return self._answers[choice.index].takes_words

    def write(self, choice: Request, news: News, chunk: pb.GenerateChunk) -> None:
        """Writes what was taken last of a choice into an empty chunk."""
        chunk.index = choice.index
        self._answers[choice.index].write(news, chunk.delta)
        _, _, finish = news
        if finish is not None:
            chunk.finish.CopyFrom(finish)


class Generator:
    """Begins what callers ask for.

    Attributes:
        answered: choices that were answered since the router started.
    """

    def __init__(
        self,
        config: RouterConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        guides: Guides,
        dispatcher: Dispatcher,
        metrics: Metrics,
    ) -> None:
        self._name = hub_name.public_name(config.model)
        self._model = model
        self._tokenizer = tokenizer
        self._guides = guides
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._waiting = WaitingBytes("too many messages wait for their guides to be compiled")
        self._serials = itertools.count()
        self.answered = 0

    @asynccontextmanager
    async def begin(self, request: pb.GenerateRequest, mailbox: Mailbox[Any], trace: Span) -> AsyncIterator[Generation]:
        """Sends the request to workers; what is not over at the end of the block ends there.

        Raises:
            CallError: it is wrong, or cannot be served.
        """
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
            choices = self._requests(job, grammar, prompt.token_ids, mailbox, trace, arrived_at)
            trace.note(request_trace.of_request(request, job, self._name, prompt_tokens))
            answers = self._answers(request, job, prompt, choices)
            generation = Generation(job, choices, answers, prompt_tokens, self._ended)
            del prompt  # its tokens take ten times as much memory here as in the requests
            self._dispatcher.submit(choices)
            try:
                self._metrics.prompt_tokens.inc(prompt_tokens)
                caller.spend(prompt_tokens)
                yield generation
            finally:
                self._dispatcher.drop(choices)
                output_tokens = generation.output_tokens
                self._metrics.output_tokens.inc(output_tokens)
                caller.spend(output_tokens)
                resumes = sum(choice.resumes for choice in choices)
                trace.note(request_trace.of_answer(output_tokens, resumes, generation.finishes))

    def _ended(self, choice: Request) -> None:
        self._dispatcher.drop([choice])
        self.answered += 1

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


def _log_finish(choice: Request, finish: pb.Finish) -> None:
    log.info(
        "answered",
        request_id=choice.id,
        choice=choice.index,
        reason=request_trace.finish_reason(finish),
        prompt_tokens=finish.usage.prompt_tokens,
        completion_tokens=finish.usage.completion_tokens,
        resumes=finish.usage.resumes,
        first_token_ms=round(finish.timing.first_token_ms, 1),
        total_ms=round(finish.timing.total_ms, 1),
    )
