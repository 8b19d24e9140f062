"""A tool call as a model writes it, to one that can go into a message again."""

import base64
import json
from dataclasses import dataclass
from hashlib import blake2b

from router import json_object
from router.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str  # a JSON object
    id: str | None = None  # that the model gave it


def of_object(source: str) -> ToolCall | None:
    """The call that a JSON object is: name, and arguments or, as Llama has it, parameters. None where it is none, or
    none that a chat could have."""
    try:
        value = json_object.parse("", source)
    except InvalidArgument:
        return None
    name, id = value.get("name"), value.get("id")
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return _fitting(ToolCall(name, _json(arguments), id if isinstance(id, str) and id else None))


def of_arguments(name: str, source: str, id: str | None) -> ToolCall | None:
    """Likewise, where only the arguments are JSON."""
    try:
        return _fitting(ToolCall(name, _json(json_object.parse("", source)), id))
    except InvalidArgument:
        return None


def make_id(request_id: str, seed: int, number: int) -> str:
    """The same request with the same seed has the same ids. Nine letters and digits, without which Mistral's templates
    refuse a call."""
    digest = blake2b(f"{request_id} {seed} {number}".encode(), digest_size=8).digest()
    return base64.b32encode(digest)[:9].decode().lower()


def _json(arguments: dict[str, object]) -> str:
    """As templates print it."""
    return json.dumps(arguments, ensure_ascii=False)


def _fitting(call: ToolCall) -> ToolCall | None:
    return call if len(call.arguments.encode()) <= json_object.MAX_BYTES else None
