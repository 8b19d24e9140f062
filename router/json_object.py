"""Parses JSON objects that callers send into values that can be given to templates and written as JSON and UTF-8."""

import json
import math
from typing import Any

from router.errors import InvalidArgument, at_most

# Parsing blocks the event loop: for the worst objects of this size some ten milliseconds.
MAX_BYTES = 256 * 1024

# A JSON schema nests two or three levels for each level that it describes. Templates recurse into it, and can do so for
# this many.
MAX_DEPTH = 64


def parse(field: str, text: str) -> dict[str, Any]:
    """
    Raises:
        InvalidArgument: names `field`, and its limit.
    """
    at_most(field, MAX_BYTES, len(text.encode()))
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise InvalidArgument(field, "must be a JSON object")
        _check(value, MAX_DEPTH)
    except RecursionError as error:
        raise InvalidArgument(field, f"is nested deeper than {MAX_DEPTH} levels") from error
    except UnicodeEncodeError as error:
        raise InvalidArgument(field, "has half of a UTF-16 surrogate pair") from error
    except ValueError as error:
        raise InvalidArgument(field, f"cannot be read as JSON: {error}") from error
    return value


def _check(value: object, levels: int) -> None:
    if isinstance(value, dict):
        for name in value:
            name.encode()
        _check_all(value.values(), levels)
    elif isinstance(value, list):
        _check_all(value, levels)
    elif isinstance(value, str):
        value.encode()
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("NaN, Infinity and what is too large for a double are no numbers of it")


def _check_all(values: Any, levels: int) -> None:
    if not levels:
        raise RecursionError
    for value in values:
        _check(value, levels - 1)
