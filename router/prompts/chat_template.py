"""Chat templates. Some models have two: one for chats, and one for chats with tools."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jinja2
from jinja2 import meta

from common.model.model_config import read_json
from common.model.model_error import ModelError
from router.errors import InvalidArgument
from router.prompts import template_environment, template_input
from router.prompts.template_input import TemplateInput
from twostroke.v1 import inference_pb2 as pb

COMMON_ROLES = ("system", "user", "assistant")

TOOL_USE = "tool_use"

# Variables that the router sets, which a chat's own may not replace.
OWN_VARIABLES = ("messages", "tools", "add_generation_prompt")


@dataclass(frozen=True, slots=True)
class _Program:
    source: str  # with double quotes replaced by single ones
    template: jinja2.Template
    reads_tools: bool

    @classmethod
    def of(cls, source: str, environment: jinja2.Environment) -> Self:
        return cls(
            source=source.replace('"', "'"),
            template=environment.from_string(source),
            reads_tools="tools" in meta.find_undeclared_variables(environment.parse(source)),
        )

    def knows_role(self, role: str) -> bool:
        return role in COMMON_ROLES or (role.isidentifier() and f"'{role}'" in self.source)


class ChatTemplate:
    """Renders chats to text. A template is a program that comes with the model, so it runs in a sandbox.

    Args:
        source: the template.
        special_tokens: the variables that it has for them, such as `eos_token`.
        tool_use: the template for chats with tools; None if it is the same.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], tool_use: str | None = None) -> None:
        environment = template_environment.make()
        self._without_tools = _Program.of(source, environment)
        self._with_tools = self._without_tools if tool_use is None else _Program.of(tool_use, environment)
        self._special_tokens = special_tokens

    @property
    def source(self) -> str:
        """The source of both templates."""
        return f"{self._without_tools.source}\n{self._with_tools.source}"

    def render(self, chat: pb.Chat, most_characters: int) -> str:
        """
        Raises:
            InvalidArgument: a field is wrong, the template does not support or refuses what is in the chat, or the
                text has more than `most_characters`.
        """
        program = self._with_tools if template_input.shown_tools(chat) else self._without_tools
        given = template_input.read(chat)
        self._check(given, program)
        variables = {
            "messages": given.messages,
            "tools": given.tools,
            "add_generation_prompt": given.add_generation_prompt,
            "documents": None,  # not undefined: templates test whether it is none
            **self._special_tokens,
            **given.variables,
        }
        pieces: list[str] = []
        characters = 0
        try:
            for piece in program.template.generate(variables):
                pieces.append(piece)
                characters += len(piece)
                if characters > most_characters:
                    break
        except Exception as error:  # templates are programs, and may raise anything
            raise InvalidArgument("chat", f"the model's chat template refuses it: {error}") from error
        # Checked while it is rendered: a template may repeat the tools, or anything else, for every message.
        if characters > most_characters:
            raise InvalidArgument(
                "chat",
                f"as the model's template writes it, it has more than {most_characters} characters, and the model's "
                "context has no room for them",
            )
        return "".join(pieces)

    def _check(self, given: TemplateInput, program: _Program) -> None:
        """Refuses what the template does not support, and would silently ignore."""
        for place, message in enumerate(given.messages):
            role = message["role"]
            if not program.knows_role(role):
                known = ", ".join(repr(role) for role in COMMON_ROLES)
                raise InvalidArgument(
                    f"chat.messages[{place}].role",
                    f"{role!r} is not one of {known}, nor named in this model's chat template",
                )
            if "tool_calls" in message and "tool_calls" not in program.source:
                raise InvalidArgument(
                    f"chat.messages[{place}].tool_calls", "this model's chat template does not know them"
                )
        if given.tools and not program.reads_tools:
            raise InvalidArgument("chat.tools", "this model's chat template does not know them")
        for name in given.variables:
            if name in OWN_VARIABLES or name in self._special_tokens:
                raise InvalidArgument(f"chat.template_variables.{name}", "is no variable that a chat may set")


def load(directory: Path) -> ChatTemplate | None:
    """The template in `chat_template.jinja` or else in `tokenizer_config.json`; None if the model has none.

    Raises:
        ModelError: one of these files is damaged.
    """
    settings_file = directory / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    template_file = directory / "chat_template.jinja"
    tool_use_file = directory / "additional_chat_templates" / f"{TOOL_USE}.jinja"
    source: str | None
    if template_file.exists():
        source, named = _read(template_file), template_file
        tool_use = _read(tool_use_file) if tool_use_file.exists() else None
    else:
        source, named = _of_settings(settings, "default"), settings_file
        tool_use = _of_settings(settings, TOOL_USE)
    if not source:
        return None
    try:
        return ChatTemplate(source, special_tokens(settings), tool_use)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ModelError(f"the chat template of {named} is not valid: {error}") from error


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is no text: {error}") from error


def _of_settings(settings: dict[str, Any], name: str) -> str | None:
    """The template of this name. One without a name is called "default"."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == name]
        template = named[0].get("template") if named else None
    elif name != "default":
        return None
    if template is not None and not isinstance(template, str):
        raise ModelError(f"chat_template is no text, but {type(template).__name__}")
    return template


def special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The special tokens that `tokenizer_config.json` names, such as `eos_token`: their texts by these names."""
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
