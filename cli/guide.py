"""Flags for what an answer must follow."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

from cyclopts import Parameter

from twostroke import Options


def _is_schema(_type: object, file: Path | None) -> None:
    if file is None:
        return
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"It cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError("It is no JSON: it is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"It is no JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    if not isinstance(schema, dict):
        raise ValueError("It holds no JSON object, and so no JSON schema")


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Guide:
    json_schema: Annotated[Path | None, Parameter(validator=_is_schema)] = None
    """A file with a JSON schema that the answer follows."""

    regex: str | None = None
    """A regular expression that the whole answer matches."""

    choices: tuple[str, ...] | None = None
    """The answer is one of these texts; may be given several times."""

    def options(self) -> Options:
        schema = None if self.json_schema is None else self.json_schema.read_text(encoding="utf-8")
        given = {"json_schema": schema, "regex": self.regex, "choices": self.choices}
        return cast(Options, {name: value for name, value in given.items() if value is not None})


def is_one(_type: object, guide: Guide) -> None:
    """Raises ValueError if there are several."""
    flags = {"--json-schema": guide.json_schema, "--regex": guide.regex, "--choices": guide.choices}
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"An answer follows one of these, and not several: {', '.join(given)}")
