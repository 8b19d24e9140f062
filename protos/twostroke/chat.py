"""Chats from Python values."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

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

    `tools` (that the model may call), `template_variables` (for the model's chat template, such as
    `{"enable_thinking": False}`), `add_generation_prompt` (whether the prompt ends with an answer's beginning).
    """

    tools: Sequence[Tool]
    template_variables: Mapping[str, object]
    add_generation_prompt: bool


def is_option(name: str) -> bool:
    return name in ChatOptions.__annotations__


def chat_of(messages: Sequence[Any]) -> pb.Chat:
    """
    Raises:
        TypeError, ValueError: a message has a key that no message has, or a value of the wrong type.
    """
    return pb.Chat(messages=[_message(message) for message in messages])


def set_option(chat: pb.Chat, name: str, value: Any) -> None:
    """
    Raises:
        TypeError, ValueError: the value has the wrong type, or is nothing that JSON can say.
    """
    if name == "tools":
        chat.tools.extend(to_json(tool) for tool in value)
    elif name == "template_variables":
        chat.template_variables = to_json(value)
    else:
        setattr(chat, name, value)


def _message(message: Mapping[str, Any]) -> pb.ChatMessage:
    fields = {key: value for key, value in message.items() if value is not None}
    calls = fields.pop("tool_calls", ())
    for key, value in fields.items():
        if key in pb.ChatMessage.DESCRIPTOR.fields_by_name and not isinstance(value, str):
            raise TypeError(f"a message's {key} is text, not {type(value).__name__}")
    return pb.ChatMessage(tool_calls=[_tool_call(call) for call in calls], **fields)


def _tool_call(call: Any) -> pb.ToolCall:
    is_function = isinstance(call, Mapping) and call.get("type", "function") == "function"
    function = call.get("function") if is_function else None
    if not isinstance(function, Mapping):
        raise TypeError("a tool call is {'id': ..., 'type': 'function', 'function': {'name': ..., 'arguments': {...}}}")
    made = pb.ToolCall(name=function.get("name", ""))
    if call.get("id") is not None:
        made.id = call["id"]
    arguments = function.get("arguments")
    if arguments is not None:
        made.arguments = arguments if isinstance(arguments, str) else to_json(arguments)
    return made


def to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
