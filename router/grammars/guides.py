"""Structured outputs: turns guides, as callers send them, into grammars, as workers run them."""

from dataclasses import replace
from pathlib import Path

from llguidance import LLMatcher

from common.model.model_config import ModelConfig
from common.sampling.grammar import GrammarError
from router import json_object
from router.callers.limits import CALLER
from router.errors import InvalidArgument, at_most
from router.grammars import json_guide, lark, tool_choice
from router.grammars.grammar_check import NoGuidesError
from router.grammars.grammar_checks import GrammarChecks
from router.grammars.tool_choice import Tool
from router.prompts.tokenizer import Tokenized
from twostroke.v1 import inference_pb2 as pb

MAX_BYTES = json_object.MAX_BYTES
MAX_CHOICES = 1024

ANY_OBJECT = '{"type": "object"}'


class Guides:
    """Makes grammars, and makes sure that each compiles before its request is sent to a worker.

    Args:
        directory: of the model.
        model: its configuration.
    """

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        self._checks = GrammarChecks(directory, model)

    async def grammar(self, guide: pb.Guide) -> str:
        """The grammar of a guide.

        Raises:
            InvalidArgument: the guide can't be compiled, or this model does not support any.
            Exhausted: too many of the caller's guides wait to be compiled.
        """
        grammar = grammar_of(guide)
        try:
            await self._check("guide", grammar)
        except GrammarError as error:
            raise InvalidArgument(f"guide.{guide.WhichOneof('kind')}", str(error)) from error
        return grammar

    async def call(self, chat: pb.Chat, prompt: Tokenized) -> str:
        """The grammar of an answer that must call a tool, by the chat's tool_choice. `prompt`: made from the chat.

        Raises:
            InvalidArgument: names the tool or the field for which that is not possible.
            Exhausted: as `grammar`.
        """
        tools, grammar = call_of(chat, prompt)
        try:
            await self._check("chat.tool_choice", grammar)
        except GrammarError as error:
            for tool in tools:  # to name the one that is wrong
                await self._check_arguments(tool)
            raise InvalidArgument("chat.tools", f"the calls cannot be compiled: {error}") from error
        return grammar

    async def _check_arguments(self, tool: Tool) -> None:
        try:
            await self._check("chat.tool_choice", tool_choice.arguments_grammar(tool))
        except ValueError as error:  # a GrammarError is one, too
            raise InvalidArgument(tool.field, f"calls of {tool.name!r} cannot be guided: {error}") from error

    async def _check(self, field: str, grammar: str) -> None:
        """
        Args:
            field: of the request, which asks for the grammar.

        Raises:
            GrammarError: the grammar can't be compiled.
            InvalidArgument: this model does not support grammars.
            Exhausted: as `grammar`.
        """
        try:
            await self._checks.check(grammar, CALLER.get().name)
        except NoGuidesError as error:
            raise InvalidArgument(field, f"answers of this model cannot be guided: {error}") from error


def call_of(chat: pb.Chat, prompt: Tokenized) -> tuple[list[Tool], str]:
    """The tools of which an answer must call one, and its grammar, not yet compiled. `prompt`: made from the chat.

    Raises:
        InvalidArgument: names the tool or the field for which there is none.
    """
    tools, several = tool_choice.tools_to_call(chat), chat.tool_choice.required
    form = replace(prompt.form, reasoning=False) if prompt.closes_reasoning else prompt.form
    return tools, tool_choice.answer_grammar(tools, form, several=several, in_reasoning=prompt.opens_reasoning)


def grammar_of(guide: pb.Guide) -> str:
    """The grammar of a guide, not yet compiled.

    Raises:
        InvalidArgument: the guide is empty, too large, or not JSON though it must be.
    """
    match guide.WhichOneof("kind"):
        case "json_schema":
            schema = json_object.parse("guide.json_schema", guide.json_schema)
            try:
                return json_guide.grammar_of(guide.json_schema, schema)
            except ValueError as error:  # the library has a parser of its own
                raise InvalidArgument("guide.json_schema", str(error)) from error
        case "json_object":
            if not guide.json_object:
                raise InvalidArgument("guide.json_object", "must be true where it is set")
            return json_guide.grammar_of(ANY_OBJECT, {})
        case "regex":
            at_most("guide.regex", MAX_BYTES, len(guide.regex.encode()))
            return LLMatcher.grammar_from_regex(guide.regex)
        case "choices":
            texts = guide.choices.texts
            if not 0 < len(texts) <= MAX_CHOICES:
                raise InvalidArgument("guide.choices", f"has {len(texts)} texts; 1 to {MAX_CHOICES} are allowed")
            at_most("guide.choices", MAX_BYTES, sum(len(text.encode()) for text in texts))
            either = " | ".join(map(lark.text, texts))
            return LLMatcher.grammar_from_lark(f"start: {either}")
        case "grammar":
            at_most("guide.grammar", MAX_BYTES, len(guide.grammar.encode()))
            return LLMatcher.grammar_from_lark(guide.grammar)
        case _:
            kinds = ", ".join(field.name for field in pb.Guide.DESCRIPTOR.oneofs_by_name["kind"].fields)
            raise InvalidArgument("guide", f"one of {kinds} must be set")
