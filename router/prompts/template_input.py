"""Turns a chat into the variables of its template: messages, tools and others, as transformers passes them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from router import json_object
from router.errors import InvalidArgument, at_most
from twostroke.v1 import inference_pb2 as pb

MAX_MESSAGES = 16_384
MAX_TOOLS = 128
MAX_TOOL_CALLS = 4_096  # of all messages together
MAX_JSON_BYTES = 1024 * 1024  # of the tools, the variables, and the arguments of all tool calls

_Optional = Literal["content", "reasoning_content", "tool_call_id", "name"]
_OPTIONAL: tuple[_Optional, ...] = get_args(_Optional)


@dataclass(frozen=True, slots=True)
class TemplateInput:
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    add_generation_prompt: bool


def read(chat: pb.Chat) -> TemplateInput:
    """The chat's sizes must have been checked.

    Raises:
        InvalidArgument: names the first field that is wrong, and its limit.
    """
    _check_choice(chat.tool_choice)
    tools = [json_object.parse(f"chat.tools[{place}]", tool) for place, tool in enumerate(shown_tools(chat))]
    return TemplateInput(
        messages=[_message(f"chat.messages[{place}]", message) for place, message in enumerate(chat.messages)],
        tools=tools or None,
        variables=json_object.parse("chat.template_variables", chat.template_variables or "{}"),
        add_generation_prompt=chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True,
    )


def shown_tools(chat: pb.Chat) -> Sequence[str]:
    """The tools that the template is given: none of them if tool_choice is none."""
    return () if chat.tool_choice.none else chat.tools


def tool_names(chat: pb.Chat) -> frozenset[str]:
    """The names of these tools. The chat must have been read."""
    names = [function_of(json.loads(tool)).get("name") for tool in shown_tools(chat)]
    return frozenset(name for name in names if isinstance(name, str))


def function_of(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool's "function". Some chats leave that level out, for templates that expect it so."""
    function = tool.get("function", tool)
    return function if isinstance(function, dict) else {}


def _check_choice(choice: pb.ToolChoice) -> None:
    kind = choice.WhichOneof("kind")
    if kind is not None and kind != "name" and not getattr(choice, kind):
        raise InvalidArgument(f"chat.tool_choice.{kind}", "must be true where it is set")


def check_sizes(chat: pb.Chat) -> None:
    """Limits numbers and sizes before anything is parsed, or waits: many small values take far more memory than bytes.

    Raises:
        InvalidArgument: names the field, and its limit.
    """
    if not chat.messages:
        raise InvalidArgument("chat.messages", "must not be empty")
    at_most("chat.messages", MAX_MESSAGES, len(chat.messages), "messages")
    at_most("chat.tools", MAX_TOOLS, len(chat.tools), "tools")
    calls = sum(len(message.tool_calls) for message in chat.messages)
    if calls > MAX_TOOL_CALLS:
        raise InvalidArgument("chat.messages", f"have {calls} tool calls; at most {MAX_TOOL_CALLS} are allowed")
    arguments = (call.arguments for message in chat.messages for call in message.tool_calls)
    size = sum(len(text.encode()) for text in (*chat.tools, chat.template_variables, *arguments))
    if size > MAX_JSON_BYTES:
        raise InvalidArgument(
            "chat",
            f"tools, template_variables and the tool calls' arguments have {size} bytes; at most {MAX_JSON_BYTES} are "
            "allowed",
        )


def _message(field: str, message: pb.ChatMessage) -> dict[str, Any]:
    """A message without the keys of fields that are not set: templates test which keys there are."""
    given: dict[str, Any] = {"role": message.role}
    if message.HasField("reasoning_content"):
        given = {"thinking": message.reasoning_content} | given  # the name that some templates have for it
    if not message.tool_calls:
        given["content"] = ""
    given |= {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    if message.tool_calls:
        given["tool_calls"] = [
            _tool_call(f"{field}.tool_calls[{place}]", call) for place, call in enumerate(message.tool_calls)
        ]
    return given


def _tool_call(field: str, call: pb.ToolCall) -> dict[str, Any]:
    if not call.name:
        raise InvalidArgument(f"{field}.name", "must not be empty")
    arguments = json_object.parse(f"{field}.arguments", call.arguments or "{}")
    given = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return {"id": call.id, **given} if call.HasField("id") else given
