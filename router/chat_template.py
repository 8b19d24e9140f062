"""A model's chat template."""

from pathlib import Path
from typing import Any

import jinja2

from common.model_config import ModelError, read_json
from router import template_environment
from router.errors import InvalidArgument
from twostroke.v1 import inference_pb2 as pb

COMMON_ROLES = ("system", "user", "assistant")


class ChatTemplate:
    """Renders chats to text. A template comes with the model, so it runs in a sandbox."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = template_environment.make()
        self._source = source.replace('"', "'")
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    def render(self, chat: pb.Chat) -> str:
        """
        Raises:
            InvalidArgument: a role is unknown, or the template refuses the messages.
        """
        if not chat.messages:
            raise InvalidArgument("chat.messages", "must not be empty")
        for place, message in enumerate(chat.messages):
            if not self._knows(message.role):
                known = ", ".join(repr(role) for role in COMMON_ROLES)
                raise InvalidArgument(
                    f"chat.messages[{place}].role",
                    f"{message.role!r} is not one of {known}, nor named in this model's chat template",
                )
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        opening = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        try:
            return self._template.render(messages=messages, add_generation_prompt=opening, **self._special_tokens)
        except Exception as error:  # the template is somebody's program: what it raises may be anything
            raise InvalidArgument("chat.messages", f"the model's chat template refuses them: {error}") from error

    def _knows(self, role: str) -> bool:
        return role in COMMON_ROLES or (role.isidentifier() and f"'{role}'" in self._source)


def load(directory: Path) -> ChatTemplate | None:
    """The template of `chat_template.jinja` or `tokenizer_config.json`; None where the model has none.

    Raises:
        ModelError: one of these files is damaged.
    """
    settings_file = directory / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    template_file = directory / "chat_template.jinja"
    source: str | None
    if template_file.exists():
        source, named = _read(template_file), template_file
    else:
        source, named = _default(settings.get("chat_template")), settings_file
    if source is None:
        return None
    try:
        return ChatTemplate(source, special_tokens(settings))
    except (jinja2.TemplateError, RecursionError) as error:
        raise ModelError(f"the chat template of {named} is not valid: {error}") from error


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is no text: {error}") from error


def _default(template: object) -> str | None:
    """The template, or that which is called "default" of several."""
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is None or template == "":
        return None
    if not isinstance(template, str):
        raise ModelError(f"chat_template is no text, but {type(template).__name__}")
    return template


def special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The tokens that `tokenizer_config.json` gives a name to, such as `eos_token`."""
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
