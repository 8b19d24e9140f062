"""Reads tool calls as models write them, and makes them fit for a message of a chat."""

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
    """A call that is written as one JSON object, with a name, and arguments (or parameters, as Llama writes them). None
    if it is no valid call, or larger than a chat may have."""
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
    """A call of which only the arguments are written in JSON; None as for `of_object`."""
    try:
        return _fitting(ToolCall(name, _json(json_object.parse("", source)), id))
    except InvalidArgument:
        return None


def make_id(request_id: str, seed: int, number: int) -> str:
    """An id for a call to which the model gave none; the same for the same request id, seed and number of the call. It
    has nine letters and digits, because Mistral's templates reject any other."""
    digest = blake2b(f"{request_id} {seed} {number}".encode(), digest_size=8).digest()
    return base64.b32encode(digest)[:9].decode().lower()


def _json(arguments: dict[str, object]) -> str:
    """Written as chat templates write JSON."""
    return json.dumps(arguments, ensure_ascii=False)


def _fitting(call: ToolCall) -> ToolCall | None:
    return call if len(call.arguments.encode()) <= json_object.MAX_BYTES else None
