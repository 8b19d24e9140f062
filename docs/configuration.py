"""Writes the tables of docs/configuration.md from the settings' dataclasses; with --check, fails where they differ."""

import ast
import inspect
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "configuration.md"


def tables() -> dict[str, str]:
    """The content of each generated part of the page, by name."""
    sys.path[:0] = [str(ROOT), str(ROOT / "protos")]
    from cli.options import Connection, Sampling
    from cli.serve import ServeConfig
    from common.config import WorkerConfig
    from decode_worker.config import DecodeConfig
    from prefill_worker.config import PrefillConfig
    from router.config import RouterConfig

    return {
        "router": table(RouterConfig),
        "worker": table(WorkerConfig),
        "prefill": table(PrefillConfig, beyond=WorkerConfig),
        "decode": table(DecodeConfig, beyond=WorkerConfig),
        "serve": table(ServeConfig),
        "connection": table(Connection),
        "sampling": table(Sampling),
    }


def table(config: type[Any], beyond: type[Any] | None = None) -> str:
    """One row for each field of `config` that `beyond` lacks."""
    known = {field.name for field in fields(beyond)} if beyond else set()
    meanings = docstrings(config)
    rows = ["| flag | environment variable | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields(config):
        if field.name not in known:
            flag, variable = field.name.replace("_", "-"), f"TWOSTROKE_{field.name.upper()}"
            rows.append(f"| `--{flag}` | `{variable}` | {default(field)} | {meanings[field.name]} |")
    return "\n".join(rows)


def default(field: "Field[Any]") -> str:
    if field.default is MISSING or field.default is None or field.default == ():
        return "not set"
    value = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def docstrings(config: type[Any]) -> dict[str, str]:
    """What stands below each field of a dataclass, on one line."""
    (definition,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def main() -> None:
    page = PAGE.read_text()
    wanted = page
    for name, content in tables().items():
        before, opening, rest = wanted.partition(f"<!-- {name} -->\n")
        _, closing, after = rest.partition("<!-- end -->")
        if not closing:
            sys.exit(f"{PAGE.name} has no place for the table of {name}")
        wanted = f"{before}{opening}{content}\n{closing}{after}"
    if "--check" in sys.argv and wanted != page:
        sys.exit(f"{PAGE.name} is not what the code says. Run: make docs")
    PAGE.write_text(wanted)


if __name__ == "__main__":
    main()
