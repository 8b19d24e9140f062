"""Requests from Python values."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

import grpc

from twostroke.errors import InvalidArgument
from twostroke.v1 import inference_pb2 as pb

Message: TypeAlias = Mapping[str, str]
"""One message of a chat, such as `{"role": "user", "content": "Hello"}`."""

Messages: TypeAlias = Sequence[Message]
Prompt: TypeAlias = str | Messages | Sequence[int]
"""Text, messages of a chat, or token ids."""


class Options(TypedDict, total=False):
    """Keyword arguments of every call that generates. What is left out takes the router's default.

    Sampling: `temperature` (0 is greedy), `top_k`, `top_p`, `min_p`, `repetition_penalty`, `presence_penalty`,
    `frequency_penalty`, `logit_bias` (token id to what is added to its logit), `seed`.
    Stopping: `max_tokens`, `min_tokens`, `stop` (string or strings), `stop_token_ids`, `include_stop`, `ignore_eos`.
    Answer: `n` choices, `logprobs` (alternatives per token), `special_tokens` (left in the text), `return_token_ids`.
    Request: `request_id` (for logs), `cache_salt` (keeps tenants' prefix caches apart), `add_generation_prompt` (chat).
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int

    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool

    n: int
    logprobs: int
    special_tokens: bool
    return_token_ids: bool

    request_id: str
    cache_salt: str
    add_generation_prompt: bool


def _fields(message: type[pb.Sampling | pb.Stopping | pb.ResponseOptions]) -> frozenset[str]:
    return frozenset(message.DESCRIPTOR.fields_by_name)


_SAMPLING = _fields(pb.Sampling)
_STOPPING = _fields(pb.Stopping)
_RESPONSE = _fields(pb.ResponseOptions)


def generate_request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """
    Raises:
        TypeError: an option does not exist, or has the wrong type.
        InvalidArgument: a number does not fit its field.
    """
    request = pb.GenerateRequest()
    try:
        _set_prompt(request, prompt)
        for name, value in options.items():
            _set_option(request, name, value)
    except ValueError as error:
        raise InvalidArgument(str(error), grpc.StatusCode.INVALID_ARGUMENT) from error
    return request


def tokenize_request(prompt: str | Messages, add_special_tokens: bool) -> pb.TokenizeRequest:
    if isinstance(prompt, str):
        return pb.TokenizeRequest(text=prompt, add_special_tokens=add_special_tokens)
    return pb.TokenizeRequest(chat=_chat(prompt), add_special_tokens=add_special_tokens)


def as_messages(messages: str | Messages) -> Messages:
    """A lone string is the user's only message."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(_chat(prompt))
    else:
        request.token_ids.SetInParent()
        _assign(request.token_ids, "ids", prompt)


def _chat(messages: Sequence[Any]) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(**message) for message in messages])


def _set_option(request: pb.GenerateRequest, name: str, value: object) -> None:
    if name in _SAMPLING:
        _assign(request.sampling, name, value)
    elif name in _STOPPING:
        _assign(request.stopping, name, [value] if isinstance(value, str) else value)
    elif name == "return_token_ids":
        _assign(request.response, "token_ids", value)
    elif name in _RESPONSE and name != "token_ids":
        _assign(request.response, name, value)
    elif name == "add_generation_prompt":
        if request.WhichOneof("input") != "chat":
            raise TypeError("add_generation_prompt is for chat messages only")
        _assign(request.chat, name, value)
    elif name in ("n", "request_id", "cache_salt"):
        _assign(request, name, value)
    else:
        raise TypeError(f"{name!r} is no option; those there are: {', '.join(Options.__annotations__)}")


def _assign(message: Any, name: str, value: Any) -> None:
    try:
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
