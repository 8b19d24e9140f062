"""The `twostroke` command. Imports next to nothing at first, so that Ctrl-C ends it quietly even while it imports."""

import os
import sys


def main(command: str | None = None) -> None:
    """Runs the command line. `python -m router` and its like pass their `command`, which their error messages then
    name, because several parts of `serve` may write to one terminal."""
    _open_what_is_closed()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # or gRPC logs every connection that ends
    try:
        _run(command)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _open_what_is_closed() -> None:
    """Of the standard streams, which whoever started this process may have closed: the next files would get their
    numbers, and what is written to them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives


def _run(command: str | None) -> None:
    from cli.commands import app
    from common.start_error import StartError

    try:
        app([command, *sys.argv[1:]] if command else None)
    except StartError as error:
        raise SystemExit(f"twostroke{f' {command}' if command else ''}: {error}") from error


if __name__ == "__main__":
    main()
