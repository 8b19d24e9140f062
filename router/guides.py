"""What answers must follow: guides as callers send them, to grammars as workers take them."""

import json
from pathlib import Path

from llguidance import LLMatcher

from common.grammar import GrammarError
from common.model_config import ModelConfig
from router import json_object
from router.errors import InvalidArgument
from router.grammar_check import NoGuidesError
from router.grammar_checks import GrammarChecks
from router.limits import CALLER
from twostroke.v1 import inference_pb2 as pb

MAX_BYTES = json_object.MAX_BYTES
MAX_CHOICES = 1024

ANY_OBJECT = '{"type": "object"}'

# Of JSON, where a schema's x-guidance says nothing else. Without a limit, a model that does not know how to go on may
# go on with spaces to the end of its context.
WHITESPACE = r"[ \t\r\n]{1,40}"


class Guides:
    """Compiles each guide once before its request goes anywhere, so that a worker need not refuse it.

    Args:
        directory: of the model.
        model: its configuration.
    """

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        self._checks = GrammarChecks(directory, model)

    async def grammar(self, guide: pb.Guide) -> str:
        """
        Raises:
            InvalidArgument: nothing can follow the guide, or this model's answers can follow none.
            CallError: RESOURCE_EXHAUSTED where too many of the caller's wait to be compiled.
        """
        grammar = grammar_of(guide)
        try:
            await self._checks.check(grammar, CALLER.get().name)
        except NoGuidesError as error:
            raise InvalidArgument("guide", f"answers of this model cannot be guided: {error}") from error
        except GrammarError as error:
            raise InvalidArgument(f"guide.{guide.WhichOneof('kind')}", str(error)) from error
        return grammar


def grammar_of(guide: pb.Guide) -> str:
    """
    Raises:
        InvalidArgument: it is empty, too large, or no JSON where it must be.
    """
    match guide.WhichOneof("kind"):
        case "json_schema":
            schema = json_object.parse("guide.json_schema", guide.json_schema)
            try:
                return _json(guide.json_schema, schema.get("x-guidance"))
            except ValueError as error:  # the library has a parser of its own
                raise InvalidArgument("guide.json_schema", str(error)) from error
        case "json_object":
            if not guide.json_object:
                raise InvalidArgument("guide.json_object", "must be true where it is set")
            return _json(ANY_OBJECT)
        case "regex":
            _check_size("guide.regex", guide.regex)
            return LLMatcher.grammar_from_regex(guide.regex)
        case "choices":
            texts = guide.choices.texts
            if not 0 < len(texts) <= MAX_CHOICES:
                raise InvalidArgument("guide.choices", f"has {len(texts)} texts; 1 to {MAX_CHOICES} are allowed")
            _check_size("guide.choices", *texts)
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, texts))}")
        case "grammar":
            _check_size("guide.grammar", guide.grammar)
            return LLMatcher.grammar_from_lark(guide.grammar)
        case _:
            kinds = ", ".join(field.name for field in pb.Guide.DESCRIPTOR.oneofs_by_name["kind"].fields)
            raise InvalidArgument("guide", f"one of {kinds} must be set")


def _json(schema: str, options: object = None) -> str:
    """`options`: of the library, that the schema itself sets."""
    says = isinstance(options, dict) and "whitespace_flexible" in options
    return LLMatcher.grammar_from_json_schema(schema, defaults={} if says else {"whitespace_pattern": WHITESPACE})


def _check_size(field: str, *texts: str) -> None:
    size = sum(len(text.encode()) for text in texts)
    if size > MAX_BYTES:
        raise InvalidArgument(field, f"has {size} bytes; at most {MAX_BYTES} are allowed")
