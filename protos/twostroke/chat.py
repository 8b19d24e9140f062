"""Chats from Python values."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

from twostroke.errors import refused
from twostroke.fields import as_json, as_list, assign, wrong_type
from twostroke.v1 import inference_pb2 as pb

Message: TypeAlias = Mapping[str, object]
"""One message of a chat, such as `{"role": "user", "content": "Hello"}`.

Other keys are `reasoning_content`, `tool_calls`, `tool_call_id` and `name`; a value of None is as good as no key. A
tool call is `{"id": "...", "type": "function", "function": {"name": "...", "arguments": {...}}}`. Its id may be left
out, and its arguments may be JSON already."""

Messages: TypeAlias = Sequence[Message]

Tool: TypeAlias = Mapping[str, object]
"""A function that the model may call, as transformers and OpenAI's API take it:
`{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}`, with a JSON schema for
the parameters."""


class ChatOptions(TypedDict, total=False):
    """Keyword arguments that go with the messages of a chat.

    `tools` (that the model may call), `tool_choice` ("auto", "none", "required", or the one tool to be called, as
    `{"type": "function", "function": {"name": "..."}}`), `template_variables` (for the model's chat template, such as
    `{"enable_thinking": False}`), `add_generation_prompt` (whether the prompt ends with an answer's beginning).
    """

    tools: Sequence[Tool]
    tool_choice: str | Tool
    template_variables: Mapping[str, object]
    add_generation_prompt: bool


_CHOICES = ("auto", "none", "required")
_ONE_TOOL = "{'type': 'function', 'function': {'name': ...}}"

_KEYS = tuple(pb.ChatMessage.DESCRIPTOR.fields_by_name)


def is_option(name: str) -> bool:
    return name in ChatOptions.__annotations__


def chat_of(messages: Any) -> pb.Chat:
    """
    Raises:
        TypeError: a value has the wrong type.
        InvalidArgument: a message has a key that no message has, or a value does not fit its field.
    """
    listed = enumerate(as_list(messages, "chat.messages"))
    return pb.Chat(messages=[_message(message, f"chat.messages[{place}]") for place, message in listed])


def set_option(chat: pb.Chat, name: str, value: Any) -> None:
    """
    Raises:
        TypeError: the value has the wrong type.
        InvalidArgument: it does not fit its field.
    """
    field = f"chat.{name}"
    if name == "tool_choice":
        _set_tool_choice(chat, value, field)
        return
    if name == "tools":
        value = [as_json(tool, f"{field}[{place}]") for place, tool in enumerate(as_list(value, field))]
    elif name == "template_variables":
        value = as_json(value, field)
    assign(chat, name, value, field)


def _set_tool_choice(chat: pb.Chat, value: Any, field: str) -> None:
    if isinstance(value, Mapping):
        function = value.get("function") if value.get("type", "function") == "function" else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise TypeError(f"{field}: one tool is {_ONE_TOOL}")
        assign(chat.tool_choice, "name", function["name"], f"{field}.name")
    elif not isinstance(value, str):
        raise wrong_type(field, "text or a dictionary", value)
    elif value not in _CHOICES:
        raise refused(field, f"{value!r} is none of {', '.join(_CHOICES)}; one tool is {_ONE_TOOL}")
    else:
        setattr(chat.tool_choice, value, True)


def _message(message: Any, field: str) -> pb.ChatMessage:
    if not isinstance(message, Mapping):
        raise wrong_type(field, "a dictionary", message)
    made = pb.ChatMessage()
    for key, value in message.items():
        if value is None:
            continue
        if key not in _KEYS:
            raise refused(field, f"{key!r} is no key of a message; those there are: {', '.join(_KEYS)}")
        if key == "tool_calls":
            calls = enumerate(as_list(value, f"{field}.{key}"))
            made.tool_calls.extend(_tool_call(call, f"{field}.{key}[{place}]") for place, call in calls)
        else:
            assign(made, key, value, f"{field}.{key}")
    return made


def _tool_call(call: Any, field: str) -> pb.ToolCall:
    is_function = isinstance(call, Mapping) and call.get("type", "function") == "function"
    function = call.get("function") if is_function else None
    if not isinstance(function, Mapping):
        form = "{'id': ..., 'type': 'function', 'function': {'name': ..., 'arguments': {...}}}"
        raise TypeError(f"{field}: a tool call is {form}")
    made = pb.ToolCall()
    assign(made, "name", function.get("name", ""), f"{field}.name")
    if call.get("id") is not None:
        assign(made, "id", call["id"], f"{field}.id")
    arguments = function.get("arguments")
    if arguments is not None:
        arguments = arguments if isinstance(arguments, str) else as_json(arguments, f"{field}.arguments")
        assign(made, "arguments", arguments, f"{field}.arguments")
    return made
