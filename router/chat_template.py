"""A model's chat template: Jinja, with the names and filters that templates on the Hugging Face hub count on."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.errors import InvalidArgument
from twostroke.v1 import inference_pb2 as pb

COMMON_ROLES = ("system", "user", "assistant")


class ChatTemplate:
    """Renders chats to text. A template comes with the model, so it runs in a sandbox."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
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
    """The template of `chat_template.jinja` or `tokenizer_config.json`; None where the model has none."""
    settings_file = directory / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text()) if settings_file.exists() else {}
    template_file = directory / "chat_template.jinja"
    source = template_file.read_text() if template_file.exists() else settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    return ChatTemplate(source, special_tokens(settings)) if source else None


def special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The tokens that `tokenizer_config.json` gives a name to, such as `eos_token`."""
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
