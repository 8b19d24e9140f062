"""Checks the fields of requests, and fills in defaults."""

import math
import random
import uuid
from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass

from common.model.model_config import ModelConfig
from router.equal_sets import one_of
from router.errors import InvalidArgument, at_most
from router.grammars import tool_choice
from router.prompts import template_input
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import worker_pb2

MAX_REQUEST_ID_BYTES = 128
MAX_CACHE_SALT_BYTES = 128
MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 1024
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
MAX_SEED = 2**64 - 1
MIN_TEMPERATURE = 9.999999e-6  # 1e-5, as a float of 32 bits has it


@dataclass(frozen=True, slots=True)
class Job:
    """A client's request without its prompt: every field is checked, every default filled in."""

    request_id: str
    n: int
    cache_salt: str
    seed: int
    sampling: worker_pb2.SamplingParams  # of choice 0; the others have copies with their own seeds
    max_tokens: int | None
    min_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: frozenset[int]  # with the model's end-of-sequence tokens, unless these are to be ignored
    include_stop: bool
    want_token_ids: bool
    logprobs: int | None
    special_tokens: bool
    parsed: bool
    guide: pb.Guide | None
    must_call: bool  # the answer must call a tool, by the chat's tool_choice


def check_request_id(request_id: str) -> None:
    """
    Raises:
        InvalidArgument: it is too long, or not fit to be printed.
    """
    at_most("request_id", MAX_REQUEST_ID_BYTES, len(request_id.encode()))
    if not request_id.isprintable():
        raise InvalidArgument("request_id", "must be printable")


def check(request: pb.GenerateRequest, model: ModelConfig) -> Job:
    """Checks all that can be checked without a tokenizer.

    Raises:
        InvalidArgument: names the first field that is wrong, and its limit.
    """
    if request.WhichOneof("input") is None:
        raise InvalidArgument("input", "one of text, chat and token_ids must be set")
    check_request_id(request.request_id)
    at_most("cache_salt", MAX_CACHE_SALT_BYTES, len(request.cache_salt.encode()))
    n = request.n if request.HasField("n") else 1
    _within("n", n, 1, MAX_N)
    logprobs = request.response.logprobs if request.response.HasField("logprobs") else None
    if logprobs is not None:
        _within("response.logprobs", logprobs, 0, MAX_LOGPROBS)
    if request.response.parsed:
        _can_be_parsed(request)
    sampling = _sampling(request.sampling, logprobs, model)
    max_tokens = _stopping(request.stopping, model)
    guide = request.guide if request.HasField("guide") else None
    if request.HasField("chat"):
        template_input.check_sizes(request.chat)
    must_call = tool_choice.must_call(request.chat)
    if guide is not None and must_call:
        raise InvalidArgument("chat.tool_choice", "a required tool call cannot go with a guide")
    if guide is not None or must_call:
        _fits_a_guide(request.stopping, "a guide" if guide is not None else "a required tool call")
    stop_token_ids = frozenset(request.stopping.stop_token_ids)
    if not request.stopping.ignore_eos:
        stop_token_ids = stop_token_ids.union(model.eos_token_ids)
    return Job(
        request_id=request.request_id or uuid.uuid4().hex,
        n=n,
        cache_salt=request.cache_salt,
        seed=sampling.seed,
        sampling=sampling,
        max_tokens=max_tokens,
        min_tokens=request.stopping.min_tokens,
        stop=tuple(dict.fromkeys(request.stopping.stop)),
        stop_token_ids=one_of(stop_token_ids),
        include_stop=request.stopping.include_stop,
        want_token_ids=request.response.token_ids if request.response.HasField("token_ids") else True,
        logprobs=logprobs,
        special_tokens=request.response.special_tokens,
        parsed=request.response.parsed,
        guide=guide,
        must_call=must_call,
    )


def check_tokens(field: str, token_ids: Sequence[int], model: ModelConfig) -> None:
    """
    Raises:
        InvalidArgument: a token is not in the vocabulary.
    """
    if token_ids and max(token_ids) >= model.vocab_size:
        place = next(place for place, token in enumerate(token_ids) if token >= model.vocab_size)
        raise InvalidArgument(
            f"{field}[{place}]", f"{token_ids[place]} is not in the vocabulary of {model.vocab_size} tokens"
        )


def check_length(prompt_tokens: int, job: Job, model: ModelConfig, held_by_all: int | None) -> int:
    """Returns the number of tokens, of prompt and output together, at which the sequence ends.

    Args:
        held_by_all: tokens of the longest sequence that fits every connected worker; None while there is no worker.

    Raises:
        InvalidArgument: the prompt has no tokens, or prompt and output do not fit.
    """
    limit, whose = model.context_length, "the model's context"
    if held_by_all is not None and held_by_all < limit:
        limit, whose = held_by_all, "the smallest worker"
    if prompt_tokens == 0:
        raise InvalidArgument("input", "the prompt has no tokens")
    _check_room(prompt_tokens, limit, whose)
    field, output = ("min_tokens", job.min_tokens) if job.max_tokens is None else ("max_tokens", job.max_tokens)
    if prompt_tokens + output > limit:
        raise InvalidArgument(
            f"stopping.{field}",
            f"{output} and the prompt's {prompt_tokens} are more than {limit}, for which {whose} has room",
        )
    return limit if job.max_tokens is None else prompt_tokens + job.max_tokens


def check_detokenize(token_ids: Sequence[int], model: ModelConfig) -> None:
    """
    Raises:
        InvalidArgument: there are more tokens than the model's context has, or some are not in the vocabulary.
    """
    if len(token_ids) > model.context_length:
        raise InvalidArgument(
            "token_ids",
            f"has {len(token_ids)} tokens; at most {model.context_length}, the model's context, are allowed",
        )
    check_tokens("token_ids", token_ids, model)


def check_prompt(token_ids: Sequence[int], model: ModelConfig) -> None:
    """
    Raises:
        InvalidArgument: a prompt of token ids is too long for the context, or some are not in the vocabulary.
    """
    _check_room(len(token_ids), model.context_length, "the model's context")
    check_tokens("token_ids.ids", token_ids, model)


def _check_room(prompt_tokens: int, limit: int, whose: str) -> None:
    if prompt_tokens >= limit:
        raise InvalidArgument(
            "input", f"the prompt has {prompt_tokens} tokens; {whose} has room for {limit}, output included"
        )


def _sampling(sampling: pb.Sampling, logprobs: int | None, model: ModelConfig) -> worker_pb2.SamplingParams:
    temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
    if temperature != 0:
        _within("sampling.temperature", temperature, MIN_TEMPERATURE, 100, or_else="0 (greedy) or ")
    top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
    if not 0 < top_p <= 1:
        raise InvalidArgument("sampling.top_p", f"{_sent(top_p)} is not within (0, 1]")
    _within("sampling.min_p", sampling.min_p, 0, 1)
    repetition_penalty = sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
    _within("sampling.repetition_penalty", repetition_penalty, 1e-3, 1e3)
    _within("sampling.presence_penalty", sampling.presence_penalty, -2, 2)
    _within("sampling.frequency_penalty", sampling.frequency_penalty, -2, 2)
    at_most("sampling.logit_bias", MAX_LOGIT_BIAS, len(sampling.logit_bias), "entries")
    for token, bias in sampling.logit_bias.items():
        if token >= model.vocab_size:
            raise InvalidArgument(f"sampling.logit_bias[{token}]", f"the vocabulary has {model.vocab_size} tokens")
        _within(f"sampling.logit_bias[{token}]", bias, -100, 100)
    return worker_pb2.SamplingParams(
        temperature=temperature,
        top_k=min(sampling.top_k, model.vocab_size),
        top_p=top_p,
        min_p=sampling.min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed if sampling.HasField("seed") else random.getrandbits(63),
        logit_bias=sampling.logit_bias,
        logprobs=logprobs,
    )


def _stopping(stopping: pb.Stopping, model: ModelConfig) -> int | None:
    max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else None
    if max_tokens is not None:
        _within("stopping.max_tokens", max_tokens, 1, model.context_length)
        if stopping.min_tokens > max_tokens:
            raise InvalidArgument(
                "stopping.min_tokens", f"{stopping.min_tokens} is more than max_tokens, which is {max_tokens}"
            )
    _within("stopping.min_tokens", stopping.min_tokens, 0, model.context_length)
    at_most("stopping.stop", MAX_STOP_STRINGS, len(stopping.stop), "strings")
    for place, stop in enumerate(stopping.stop):
        if not stop:
            raise InvalidArgument(f"stopping.stop[{place}]", "must not be empty")
        at_most(f"stopping.stop[{place}]", MAX_STOP_STRING_BYTES, len(stop.encode()))
    at_most("stopping.stop_token_ids", MAX_STOP_TOKENS, len(stopping.stop_token_ids), "tokens")
    check_tokens("stopping.stop_token_ids", stopping.stop_token_ids, model)
    return max_tokens


def _can_be_parsed(request: pb.GenerateRequest) -> None:
    if request.WhichOneof("input") != "chat":
        raise InvalidArgument("response.parsed", "goes with chat only: its template tells how the answer is written")
    if request.response.special_tokens:
        raise InvalidArgument(
            "response.special_tokens", "cannot go with parsed, which takes out what special tokens mark"
        )


def _fits_a_guide(stopping: pb.Stopping, guide: str) -> None:
    """A guided answer ends when it is complete: then only an end-of-sequence token can come."""
    if stopping.ignore_eos:
        raise InvalidArgument(
            "stopping.ignore_eos", f"cannot go with {guide}, by which an answer ends when it is complete"
        )
    if stopping.min_tokens:
        raise InvalidArgument("stopping.min_tokens", f"cannot go with {guide}: it may be complete before that")


def _within(field: str, value: float, least: float, most: float, or_else: str = "") -> None:
    if not math.isfinite(value) or not least <= value <= most:
        raise InvalidArgument(field, f"{_sent(value)} is not {or_else}within [{_plain(least)}, {_plain(most)}]")


def _sent(value: float) -> str:
    """A field's value, with as many digits as tell a float of 32 bits from its neighbours: 1.0000001 is not 1."""
    texts = [_plain(value), *(f"{value:.{digits}g}" for digits in (7, 8, 9))]
    return next((text for text in texts if c_float(float(text)).value == value), texts[0])


def _plain(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
