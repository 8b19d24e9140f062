"""Requests from Python values."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from twostroke import chat
from twostroke.chat import ChatOptions, Messages
from twostroke.errors import refused
from twostroke.fields import BYTES, as_json, assign, wrong_type
from twostroke.v1 import inference_pb2 as pb

MAX_REQUEST_BYTES = 4 * 1024 * 1024  # that a router takes

_Request = TypeVar("_Request", pb.GenerateRequest, pb.TokenizeRequest, pb.DetokenizeRequest)

Prompt: TypeAlias = str | Messages | Sequence[int]
"""Text, messages of a chat, or token ids."""


class Options(ChatOptions, total=False):
    """Keyword arguments of every call that generates. What is left out takes the router's default.

    Sampling: `temperature` (0 is greedy), `top_k`, `top_p`, `min_p`, `repetition_penalty`, `presence_penalty`,
    `frequency_penalty`, `logit_bias` (token id to what is added to its logit), `seed`.
    Stopping: `max_tokens`, `min_tokens`, `stop` (string or strings), `stop_token_ids`, `include_stop`, `ignore_eos`.
    Guide, one of: `json_schema` (a dictionary, or JSON), `json_object` (True: any JSON object), `regex`, `choices`
    (texts), `grammar` (in llguidance's dialect of Lark); the answer's text follows it.
    Answer: `n` choices, `logprobs` (alternatives per token), `special_tokens` (left in the text), `return_token_ids`.
    `parsed` (of a chat's answer: reasoning and tool calls are taken out of the text; where there are `tools` it is on,
    unless it is given, or `special_tokens` are to stay).
    Request: `request_id` (for logs), `cache_salt` (keeps tenants' prefix caches apart).
    Chats only: `tools` (that the model may call), `tool_choice` ("auto", "none", "required", or the one to
    call), `template_variables` (such as `{"enable_thinking": False}`), `add_generation_prompt`.
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

    json_schema: Mapping[str, object] | str
    json_object: bool
    regex: str
    choices: Sequence[str]
    grammar: str

    n: int
    logprobs: int
    special_tokens: bool
    parsed: bool
    return_token_ids: bool

    request_id: str
    cache_salt: str


def _fields(message: type[pb.Sampling | pb.Stopping | pb.ResponseOptions]) -> frozenset[str]:
    return frozenset(message.DESCRIPTOR.fields_by_name)


_SAMPLING = _fields(pb.Sampling)
_STOPPING = _fields(pb.Stopping)
_RESPONSE = _fields(pb.ResponseOptions)
_GUIDE = frozenset(pb.Guide.DESCRIPTOR.fields_by_name)


def generate_request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """
    Raises:
        TypeError: an option does not exist, or something has the wrong type.
        InvalidArgument: a value does not fit its field, or all of them together no message.
    """
    request = pb.GenerateRequest()
    if isinstance(prompt, str):
        assign(request, "text", prompt, "text")
    elif not isinstance(prompt, Sequence) or isinstance(prompt, BYTES):
        raise TypeError(f"a prompt is text, messages of a chat or a list of token ids, not {type(prompt).__name__}")
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(chat.chat_of(prompt))
    else:
        request.token_ids.SetInParent()
        assign(request.token_ids, "ids", prompt, "token_ids.ids")
    return _with_options(request, options)


def chat_request(messages: str | Messages, options: Options) -> pb.GenerateRequest:
    """A lone string is the user's only message. Raises as `generate_request`."""
    listed = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return _with_options(pb.GenerateRequest(chat=chat.chat_of(listed)), options)


def tokenize_request(prompt: str | Messages, add_special_tokens: bool, options: ChatOptions) -> pb.TokenizeRequest:
    """Raises as `generate_request`."""
    request = pb.TokenizeRequest()
    if isinstance(prompt, str):
        assign(request, "text", prompt, "text")
    else:
        request.chat.CopyFrom(chat.chat_of(prompt))
    assign(request, "add_special_tokens", add_special_tokens, "add_special_tokens")
    for name, value in options.items():
        if not chat.is_option(name):
            raise TypeError(f"{name!r} is no option; those there are: {', '.join(ChatOptions.__annotations__)}")
        _set_chat_option(request, name, value)
    return _sendable(request)


def detokenize_request(token_ids: Sequence[int], special_tokens: bool) -> pb.DetokenizeRequest:
    """Raises as `generate_request`."""
    request = pb.DetokenizeRequest()
    assign(request, "token_ids", token_ids, "token_ids")
    assign(request, "special_tokens", special_tokens, "special_tokens")
    return _sendable(request)


def _with_options(request: pb.GenerateRequest, options: Options) -> pb.GenerateRequest:
    for name, value in options.items():
        _set_option(request, name, value)
    if request.chat.tools and "parsed" not in options and not request.response.special_tokens:
        request.response.parsed = True
    return _sendable(request)


def _sendable(request: _Request) -> _Request:
    """gRPC's own refusal has the code of a router that is overloaded, and callers would try again."""
    size = request.ByteSize()
    if size > MAX_REQUEST_BYTES:
        raise refused("request", f"has {size} bytes; at most {MAX_REQUEST_BYTES} are allowed")
    return request


def _set_option(request: pb.GenerateRequest, name: str, value: object) -> None:
    if name in _SAMPLING:
        assign(request.sampling, name, value, f"sampling.{name}")
    elif name in _STOPPING:
        one_string = name == "stop" and isinstance(value, str)
        assign(request.stopping, name, [value] if one_string else value, f"stopping.{name}")
    elif name == "return_token_ids":
        assign(request.response, "token_ids", value, "response.token_ids")
    elif name in _RESPONSE and name != "token_ids":
        assign(request.response, name, value, f"response.{name}")
    elif name in _GUIDE:
        _set_guide(request, name, value)
    elif chat.is_option(name):
        _set_chat_option(request, name, value)
    elif name in ("n", "request_id", "cache_salt"):
        assign(request, name, value, name)
    else:
        raise TypeError(f"{name!r} is no option; those there are: {', '.join(Options.__annotations__)}")


def _set_guide(request: pb.GenerateRequest, name: str, value: Any) -> None:
    if request.HasField("guide"):
        raise TypeError(f"{name} and {request.guide.WhichOneof('kind')} are both guides; an answer follows one")
    field = f"guide.{name}"
    if name == "choices":
        request.guide.choices.SetInParent()
        assign(request.guide.choices, "texts", value, field)
    elif name == "json_schema" and not isinstance(value, str):
        if not isinstance(value, Mapping):
            raise wrong_type(field, "a dictionary or JSON", value)
        assign(request.guide, name, as_json(value, field), field)
    else:
        assign(request.guide, name, value, field)


def _set_chat_option(request: pb.GenerateRequest | pb.TokenizeRequest, name: str, value: object) -> None:
    if request.WhichOneof("input") != "chat":
        raise TypeError(f"{name} is for chat messages only")
    chat.set_option(request.chat, name, value)
