"""Grammars of JSON schemas, with defaults for what a schema's `x-guidance` does not set."""

from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher

# White space is limited: a model that is unsure how to go on may otherwise write spaces to the end of its context.
_DEFAULTS = {"whitespace_pattern": r"[ \t\r\n]{1,40}"}

_OPTIONS = "x-guidance"


def grammar_of(text: str, schema: Mapping[str, Any]) -> str:
    """
    Args:
        text: the schema as the caller sent it.
        schema: the same, parsed.

    Raises:
        ValueError: llguidance, which has a parser of its own, can't read it.
    """
    return LLMatcher.grammar_from_json_schema(text, defaults=_defaults(schema.get(_OPTIONS)))


def as_inlined(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with the defaults written into it, for use inside a Lark grammar, to which no defaults can be
    passed."""
    options = schema.get(_OPTIONS, {})
    return {**schema, _OPTIONS: _defaults(options) | options} if isinstance(options, dict) else dict(schema)


def _defaults(options: object) -> Any:
    says = isinstance(options, dict) and "whitespace_flexible" in options
    return {} if says else _DEFAULTS
