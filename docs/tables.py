"""Writes the tables of docs/ that come from the code: settings from their dataclasses, modules from their docstrings.

With --check it changes nothing, and fails where a page is not what the code says.
"""

import ast
import inspect
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parent.parent
ROOMS = ("router", "prefill_worker", "decode_worker", "common", "kernels", "cli", "benchmarks")


def pages() -> dict[str, dict[str, str]]:
    """The generated parts of each page, by name."""
    sys.path[:0] = [str(ROOT), str(ROOT / "protos")]
    from cli.options import Connection, Sampling
    from cli.serve_config import ServeConfig
    from common.security.security_config import SecurityConfig, TlsConfig
    from common.worker.config import WorkerConfig
    from decode_worker.config import DecodeConfig
    from prefill_worker.config import PrefillConfig
    from router.config import RouterConfig

    return {
        "configuration.md": {
            "security": settings(SecurityConfig),
            "router": settings(RouterConfig, beyond=SecurityConfig),
            "worker": settings(WorkerConfig, beyond=SecurityConfig),
            "prefill": settings(PrefillConfig, beyond=WorkerConfig),
            "decode": settings(DecodeConfig, beyond=WorkerConfig),
            "serve": settings(ServeConfig, beyond=SecurityConfig),
            "connection": settings(Connection, beyond=TlsConfig),
            "sampling": settings(Sampling),
        },
        "architecture.md": {"modules": modules()},
    }


def settings(config: type[Any], beyond: type[Any] | None = None) -> str:
    """One row for each field of `config` that `beyond` lacks."""
    known = {field.name for field in fields(beyond)} if beyond else set()
    types = get_type_hints(config)
    meanings = {name: text for part in reversed(config.__mro__[:-1]) for name, text in docstrings(part).items()}
    rows = ["| flag | environment variable | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields(config):
        if field.name not in known:
            flag, variable = field.name.replace("_", "-"), f"TWOSTROKE_{field.name.upper()}"
            meaning = " ".join([meanings[field.name], *choices(types[field.name])])
            rows.append(f"| `--{flag}` | `{variable}` | {default(field)} | {meaning} |")
    return "\n".join(rows)


def default(field: "Field[Any]") -> str:
    if field.default is MISSING or field.default is None or field.default == ():
        return "not set"
    value = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def choices(type_: Any) -> list[str]:
    """A sentence with the values that a setting may have, if they are few."""
    values = [value for part in (type_, *get_args(type_)) if get_origin(part) is Literal for value in get_args(part)]
    return [f"One of {', '.join(values)}."] if values else []


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


def modules() -> str:
    """One line for each folder and module that has something to say: the first paragraph of its docstring."""
    rows = ["| module | what it holds |", "| --- | --- |"]
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py"), key=lambda path: (path.parent, path.name)):
            text = ast.get_docstring(ast.parse(path.read_text()))
            if text and path.name != "__main__.py":
                name = path.relative_to(ROOT).as_posix().removesuffix("/__init__.py")
                rows.append(f"| `{name}` | {' '.join(text.split(chr(10) * 2)[0].split())} |")
    return "\n".join(rows)


def main() -> None:
    for name, parts in pages().items():
        page = ROOT / "docs" / name
        present = wanted = page.read_text()
        for part, content in parts.items():
            before, opening, rest = wanted.partition(f"<!-- {part} -->\n")
            _, closing, after = rest.partition("<!-- end -->")
            if not closing:
                sys.exit(f"{name} has no place for {part}")
            wanted = f"{before}{opening}{content}\n{closing}{after}"
        if present == wanted:
            continue
        if "--check" in sys.argv:
            sys.exit(f"{name} is not what the code says. Run: make docs")
        page.write_text(wanted)


if __name__ == "__main__":
    main()
