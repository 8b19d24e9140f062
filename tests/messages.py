"""Protobuf messages out of their descriptors, for fuzzing: a field that is added is tried without anyone's doing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

Strategy = st.SearchStrategy[Any]

_SIGNED, _UNSIGNED = "signed", "unsigned"
_INTEGERS = {
    FieldDescriptor.TYPE_INT32: (_SIGNED, 32),
    FieldDescriptor.TYPE_INT64: (_SIGNED, 64),
    FieldDescriptor.TYPE_SINT32: (_SIGNED, 32),
    FieldDescriptor.TYPE_SINT64: (_SIGNED, 64),
    FieldDescriptor.TYPE_SFIXED32: (_SIGNED, 32),
    FieldDescriptor.TYPE_SFIXED64: (_SIGNED, 64),
    FieldDescriptor.TYPE_UINT32: (_UNSIGNED, 32),
    FieldDescriptor.TYPE_UINT64: (_UNSIGNED, 64),
    FieldDescriptor.TYPE_FIXED32: (_UNSIGNED, 32),
    FieldDescriptor.TYPE_FIXED64: (_UNSIGNED, 64),
}
_NAN_AND_FRIENDS = [float("nan"), float("inf"), float("-inf"), -0.0, 1e-45, 3.4e38, -3.4e38, -1.0, 0.0, 0.5, 1.0, 2.0]
_MANY = 20_000  # entries of a repeated field that is far too long
_LONG = 300_000  # bytes of a text that is far too long


def fuzz(examples: int) -> settings:
    """The same examples in every run; as slow as the system under test."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # each example takes its time, and so would looking for a smaller one
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True, slots=True)
class Path:
    """A field somewhere in a message, by the names on the way to it."""

    names: tuple[str, ...]
    field: FieldDescriptor

    def __str__(self) -> str:
        return ".".join(self.names)

    def put(self, message: Message, value: Any) -> None:
        """Sets the field in `message`, making what lies on the way. Of repeated messages on the way, the first."""
        for name in self.names[:-1]:
            inner = getattr(message, name)
            if not isinstance(inner, Message):
                inner = inner[0] if inner else inner.add()
            inner.SetInParent()
            message = inner
        _assign(message, self.field, value)


def paths(descriptor: Descriptor, prefix: tuple[str, ...] = ()) -> Iterator[Path]:
    """Every field, messages and what is in them alike."""
    for field in descriptor.fields:
        names = (*prefix, field.name)
        yield Path(names, field)
        if _is_message(field) and not _is_map(field):
            yield from paths(_message_type(field), names)


def messages(descriptor: Descriptor, known: Callable[[FieldDescriptor], Strategy | None] | None = None) -> Strategy:
    """Messages with any of their fields set. `known` may name values for a field that are worth trying, such as ids
    that exist; others are tried as well."""

    @st.composite
    def build(draw: st.DrawFn) -> Message:
        message = GetMessageClass(descriptor)()
        for field in draw(st.lists(st.sampled_from(list(descriptor.fields)), unique_by=lambda field: field.number)):
            _assign(message, field, draw(values(field, known)))
        return message

    return build() if descriptor.fields else st.builds(GetMessageClass(descriptor))


def values(field: FieldDescriptor, known: Callable[[FieldDescriptor], Strategy | None] | None = None) -> Strategy:
    """What a field can be set to: the ends of its range, and beyond all measure."""
    if _is_map(field):
        key, value = (_message_type(field).fields_by_name[name] for name in ("key", "value"))
        few = st.dictionaries(_single(key, known), _single(value, known), max_size=3)
        return few | _single(value, known).map(lambda it: dict.fromkeys(range(_MANY), it))
    single = _single(field, known)
    if field.is_repeated:
        return st.lists(single, max_size=4) | single.map(lambda it: [it] * _repeats(it))
    return single


def _single(field: FieldDescriptor, known: Callable[[FieldDescriptor], Strategy | None] | None) -> Strategy:
    anything = _anything(field, known)
    suggested = known(field) if known is not None else None
    return anything if suggested is None else suggested | suggested | anything


def _anything(field: FieldDescriptor, known: Callable[[FieldDescriptor], Strategy | None] | None) -> Strategy:
    kind = field.type
    if kind in _INTEGERS:
        sign, bits = _INTEGERS[kind]
        least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if sign == _SIGNED else (0, 2**bits - 1)
        return st.sampled_from([least, 0, 1, 2, most // 2, most // 2 + 1, most - 1, most]) | st.integers(least, most)
    if kind in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return st.sampled_from(_NAN_AND_FRIENDS) | st.floats(width=32)
    if kind == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if kind == FieldDescriptor.TYPE_ENUM:
        assert field.enum_type is not None
        declared = [value.number for value in field.enum_type.values]
        return st.sampled_from([*declared, max(declared) + 1, 2**31 - 1, -(2**31)])
    if kind == FieldDescriptor.TYPE_STRING:
        return st.sampled_from(["", "\0", "x" * _LONG, "é" * (_LONG // 2), "\u202e%s%n{}'\"\n", "user"]) | st.text(
            max_size=30
        )
    if kind == FieldDescriptor.TYPE_BYTES:
        return st.sampled_from([b"", b"\0", b"x" * _LONG]) | st.binary(max_size=40)
    assert _is_message(field), f"{field.full_name} is of a type that nobody thought of"
    return messages(_message_type(field), known)


def _repeats(value: object) -> int:
    size = value.ByteSize() if isinstance(value, Message) else len(value) if isinstance(value, (str, bytes)) else 0
    return max(1, min(_MANY, 3 * _LONG // (size + 1)))


def _is_message(field: FieldDescriptor) -> bool:
    return field.type == FieldDescriptor.TYPE_MESSAGE


def _message_type(field: FieldDescriptor) -> Descriptor:
    assert field.message_type is not None
    return field.message_type


def _is_map(field: FieldDescriptor) -> bool:
    return _is_message(field) and bool(_message_type(field).GetOptions().map_entry)


def _assign(message: Message, field: FieldDescriptor, value: Any) -> None:
    if _is_map(field) or field.is_repeated:
        message.ClearField(field.name)
        container = getattr(message, field.name)
        if isinstance(value, dict):
            container.update(value)
        else:
            container.extend(value)
    elif _is_message(field):
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)
