"""Python values into the fields of a message. What does not fit is refused as the router refuses what is wrong: by the
field's name in the request, and its limit."""

import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import contextmanager, suppress
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from twostroke.errors import refused

BYTES = (bytes, bytearray, memoryview)
"""What protobuf would take for text, or for a list of small numbers."""

_KINDS = {
    FieldDescriptor.TYPE_STRING: "text",
    FieldDescriptor.TYPE_BOOL: "true or false",
    FieldDescriptor.TYPE_UINT32: "a whole number",
    FieldDescriptor.TYPE_UINT64: "a whole number",
    FieldDescriptor.TYPE_FLOAT: "a number",
}
_RANGES = {
    FieldDescriptor.TYPE_BOOL: "[0, 1]",
    FieldDescriptor.TYPE_UINT32: f"[0, {2**32 - 1}]",
    FieldDescriptor.TYPE_UINT64: f"[0, {2**64 - 1}]",
    FieldDescriptor.TYPE_FLOAT: "[-3.4e38, 3.4e38]",
}
_REFUSALS = (TypeError, ValueError, OverflowError)  # protobuf's own, which name no field


def assign(message: Message, name: str, value: Any, place: str) -> None:
    """Sets the field `name` of `message`, of which nothing is set yet. `place` is what the request calls it.

    Raises:
        TypeError: the value has the wrong type.
        InvalidArgument: it does not fit the field.
    """
    field: Any = message.DESCRIPTOR.fields_by_name[name]
    held = getattr(message, name)
    if isinstance(held, MutableMapping):
        if not isinstance(value, Mapping):
            raise wrong_type(place, "a dictionary", value)
        entry: Any = GetMessageClass(field.message_type)()
        for key, item in value.items():
            assign(entry, "key", key, place)
            assign(entry, "value", item, f"{place}[{key}]")
            held[entry.key] = entry.value
    elif isinstance(held, MutableSequence):
        _extend(held, field.type, as_list(value, place), place)
    else:
        with _refusals(field.type, value, place):
            setattr(message, name, _checked(field.type, value))


def as_list(value: Any, place: str) -> list[Any]:
    """
    Raises:
        TypeError: it is one thing, and not several.
    """
    if not isinstance(value, Iterable) or isinstance(value, (str, Mapping, *BYTES)):
        raise wrong_type(place, "a list", value)
    return list(value)


def as_json(value: Any, place: str) -> str:
    """
    Raises:
        TypeError: it is no dictionary, or holds what JSON does not know.
        InvalidArgument: it holds NaN, an infinite number or itself, or is nested too deep.
    """
    if not isinstance(value, Mapping):
        raise wrong_type(place, "a dictionary", value)
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_as_dict)
    except TypeError as error:
        raise TypeError(f"{place}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise refused(place, str(error)) from error


def _as_dict(value: object) -> dict[Any, Any]:
    """A dictionary of a kind that Python's JSON does not know, such as a read-only one."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def wrong_type(place: str, wanted: str, value: object) -> TypeError:
    return TypeError(f"{place}: must be {wanted}, not {type(value).__name__}")


def _extend(held: MutableSequence[Any], kind: int, values: list[Any], place: str) -> None:
    if kind != FieldDescriptor.TYPE_STRING:
        with suppress(*_REFUSALS):
            held.extend(values)  # all at once: long prompts have a hundred thousand of them
            return
    for index, value in enumerate(values):
        with _refusals(kind, value, f"{place}[{index}]"):
            held.append(_checked(kind, value))


def _checked(kind: int, value: Any) -> Any:
    """Raises what protobuf raises of the wrong type, and of a text that has no UTF-8."""
    if kind == FieldDescriptor.TYPE_STRING:
        if not isinstance(value, str):  # it would take bytes
            raise TypeError
        value.encode()
    return value


@contextmanager
def _refusals(kind: int, value: Any, place: str) -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError as error:
        surrogate = value[error.start]
        raise refused(place, f"character {error.start} is the surrogate {surrogate!r}, not in UTF-8") from error
    except TypeError as error:
        raise wrong_type(place, _KINDS[kind], value) from error
    except (ValueError, OverflowError) as error:
        raise refused(place, f"{value} is not within {_RANGES[kind]}") from error
