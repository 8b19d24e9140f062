"""The `twostroke` command, from its first moment: Ctrl-C ends it quietly while it still imports what it needs."""

import os
import sys


def main(command: str | None = None) -> None:
    """Runs the command line; `command` is what `python -m router` and its like put in front of their flags; it is
    named in what the part says where it cannot start, which in `serve` several may do."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else gRPC tells of every connection that ends
    try:
        _run(command)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _run(command: str | None) -> None:
    from cli.commands import app
    from common.start_error import StartError

    try:
        app([command, *sys.argv[1:]] if command else None)
    except StartError as error:
        raise SystemExit(f"twostroke{f' {command}' if command else ''}: {error}") from error


if __name__ == "__main__":
    main()
