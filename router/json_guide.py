"""How answers write the JSON of a schema, where its x-guidance says nothing else."""

from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher

# Without a limit, a model that does not know how to go on may go on with spaces to the end of its context.
_DEFAULTS = {"whitespace_pattern": r"[ \t\r\n]{1,40}"}

_OPTIONS = "x-guidance"


def grammar_of(text: str, schema: Mapping[str, Any]) -> str:
    """
    Args:
        text: the schema, as it came.
        schema: what is in it.

    Raises:
        ValueError: the library, which has a parser of its own, cannot read it.
    """
    return LLMatcher.grammar_from_json_schema(text, defaults=_defaults(schema.get(_OPTIONS)))


def as_inlined(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The same schema for a grammar of Lark to have in it, where there are no defaults."""
    options = schema.get(_OPTIONS, {})
    return {**schema, _OPTIONS: _defaults(options) | options} if isinstance(options, dict) else dict(schema)


def _defaults(options: object) -> Any:
    says = isinstance(options, dict) and "whitespace_flexible" in options
    return {} if says else _DEFAULTS
