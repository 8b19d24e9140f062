"""Required tool calls: the grammar of an answer that calls one of a chat's tools, in the form that the model knows."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from router import json_object
from router.answers.answer_parser import MAX_NAME, NAME
from router.errors import InvalidArgument
from router.grammars import json_guide, lark
from router.prompts.template_input import function_of
from router.vocabulary.answer_format import (
    ARGS,
    CALL_ID,
    END_THINK,
    END_TOOL_CALL,
    THINK,
    TOOL_CALL,
    TOOL_CALLS,
    AnswerFormat,
    Calls,
)
from twostroke.v1 import inference_pb2 as pb

# Of a tool without parameters, as in OpenAI's API.
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}

# The id of a call, which some models have learned to write.
_ID = "/[a-zA-Z0-9]{9}/"


@dataclass(frozen=True, slots=True)
class Tool:
    field: str  # of the request, for error sentences
    name: str
    parameters: dict[str, Any]  # a JSON schema, of an object


def must_call(chat: pb.Chat) -> bool:
    return chat.tool_choice.WhichOneof("kind") in ("required", "name")


def tools_to_call(chat: pb.Chat) -> list[Tool]:
    """The tools of which the answer must call one. The chat must have been read by `template_input`.

    Raises:
        InvalidArgument: there are none, the chosen one is not among them, or one has no usable name or parameters.
    """
    if not chat.tools:
        raise InvalidArgument("chat.tool_choice", "there are no tools to call: set chat.tools")
    functions = {f"chat.tools[{place}]": function_of(json.loads(tool)) for place, tool in enumerate(chat.tools)}
    if chat.tool_choice.HasField("name"):
        name = chat.tool_choice.name
        functions = {field: function for field, function in functions.items() if name and function.get("name") == name}
        if not functions:
            raise InvalidArgument("chat.tool_choice.name", f"{name!r} is the name of no tool in chat.tools")
    tools = [_tool(field, function) for field, function in functions.items()]
    size = sum(len(json.dumps(tool.parameters, ensure_ascii=False).encode()) for tool in tools)
    if size > json_object.MAX_BYTES:
        raise InvalidArgument(
            "chat.tools",
            f"the parameters of those of which one must be called have {size} bytes; at most {json_object.MAX_BYTES} "
            "are allowed",
        )
    return tools


def _tool(field: str, function: dict[str, Any]) -> Tool:
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise InvalidArgument(field, "has no name to call it by")
    if parameters is None:
        return Tool(field, name, _NO_PARAMETERS)
    if not isinstance(parameters, dict):
        raise InvalidArgument(field, f"the parameters of {name!r} must be a JSON schema in an object")
    kind = parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidArgument(field, f"the parameters of {name!r} must have the type object, as all arguments have")
    return Tool(field, name, {**parameters, "type": "object"})


def arguments_grammar(tool: Tool) -> str:
    """The grammar of one tool's arguments alone.

    Raises:
        ValueError: llguidance can't read their schema.
    """
    return LLMatcher.grammar_from_json_schema(json_guide.as_inlined(tool.parameters))


def answer_grammar(tools: Sequence[Tool], form: AnswerFormat, *, several: bool, in_reasoning: bool) -> str:
    """The grammar of an answer that calls one of the tools, after reasoning if the model begins with that.

    Args:
        form: how the model marks reasoning and calls.
        several: more calls may follow, if the form allows several.
        in_reasoning: the prompt ends with the beginning of reasoning.

    Raises:
        InvalidArgument: the form is not known, or a tool's name can't be written in it.
    """
    match form.calls:
        case Calls.TAGGED:
            answer = 'tagged ("\\n" tagged)*' if several else "tagged"
            rules = [f'tagged: {_mark(form, TOOL_CALL)} "\\n" call "\\n" {_mark(form, END_TOOL_CALL)}']
            write = _object_with("arguments")
        case Calls.NAMED:
            answer, rules = "call+" if several else "call", []
            write = _named(form)
        case Calls.LISTED:
            calls = 'call (", " call)*' if several else "call"
            answer, rules = f'{_mark(form, TOOL_CALLS)} " "? "[" {calls} "]"', []
            write = _object_with("arguments", f'(", \\"id\\": \\"" {_ID} "\\"")?')
        case Calls.BARE:  # Llama's templates refuse several
            answer, rules = "call", []
            write = _object_with("parameters")
        case None:
            raise InvalidArgument("chat.tool_choice", "the router does not know how this model writes calls of tools")
    if form.reasoning:
        answer = f"{_reasoning(form, in_reasoning)} {answer}"
        rules += [_thoughts(form), r"BLANKS: /[ \t\r\n]{1,40}/"]
    rules.append(f"call: {' | '.join(f'call_{place}' for place in range(len(tools)))}")
    for place, tool in enumerate(tools):
        rules.append(f"call_{place}: {write(tool, f'arguments_{place}')}")
        schema = json.dumps(json_guide.as_inlined(tool.parameters), ensure_ascii=False)
        rules.append(f"arguments_{place}: %json {schema}")
    return LLMatcher.grammar_from_lark("\n".join([f"start: {answer}", *rules]))


# ------------------------------------------------------------ in Lark


def _mark(form: AnswerFormat, mark: str) -> str:
    """A mark in Lark. One that is a token is written by its id: a text in a grammar never matches a special token, and
    llguidance takes every token that looks like a tag for special."""
    token = form.tokens.get(mark)
    return json.dumps(mark) if token is None else f"<[{token}]>"


def _object_with(arguments: str, more: str = "") -> Callable[[Tool, str], str]:
    def write(tool: Tool, rule: str) -> str:
        name = json.dumps(tool.name, ensure_ascii=False)
        opening = f'{{"name": {name}, "{arguments}": '
        return f'{lark.text(opening)} {rule} {more} "}}"'

    return write


def _named(form: AnswerFormat) -> Callable[[Tool, str], str]:
    id = f"({_mark(form, CALL_ID)} {_ID})?" if CALL_ID in form.tokens else ""

    def write(tool: Tool, rule: str) -> str:
        if not NAME.fullmatch(tool.name) or len(tool.name) > MAX_NAME:
            raise InvalidArgument(tool.field, f"this model has no way to write the name {tool.name!r} in a call")
        return f"{_mark(form, TOOL_CALLS)} {json.dumps(tool.name)} {id} {_mark(form, ARGS)} {rule}"

    return write


def _reasoning(form: AnswerFormat, in_reasoning: bool) -> str:
    if in_reasoning:  # some models repeat the mark with which the prompt ends
        return f"{_mark(form, THINK)}? thoughts BLANKS?"
    return f"({_mark(form, THINK)} thoughts BLANKS?)?"


def _thoughts(form: AnswerFormat) -> str:
    """Rules for the text of the reasoning, with the mark at its end."""
    if END_THINK not in form.tokens:
        return r"thoughts[lazy]: /(?s:.*)<\/think>/"
    # The text may not have the mark spelled with other tokens either: the answer's parser may take that for the mark.
    return f"thoughts: THOUGHTS? {_mark(form, END_THINK)}\nTHOUGHTS: /(?s:.+)/ & ~/(?s:.*)<\\/think>(?s:.*)/"
