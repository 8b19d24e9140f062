"""Log lines for people or for machines, by structlog."""

import logging
import sys
from contextlib import suppress
from typing import Literal, TextIO, cast

import structlog


class _Lossy:
    """Loses what cannot be written, on a full disk or to a reader that is gone: whatever logs a line must go on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def _has_no_metadata(record: logging.LogRecord) -> bool:
    """gRPC logs metadata that is not UTF-8 with its value: an API key with one wrong character, for example."""
    return not str(record.msg).startswith("Invalid encoding on")


def configure(log_format: Literal["people", "json"]) -> None:
    """Sets up this process's log: one line an event on stderr, with time and level.

    Fields bound with `structlog.contextvars`, such as a request's id, are in every line of their task. Prompts,
    tokens and metadata are never logged. Lines that cannot be written are lost. Other warnings and errors of the
    standard library's loggers go to stderr as they are.
    """
    renderer: structlog.typing.Processor
    if log_format == "json":
        renderer = structlog.processors.JSONRenderer()
        problems: list[structlog.typing.Processor] = [structlog.processors.format_exc_info]
    else:
        # structlog's own tracebacks show local variables, and with them prompts
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
        )
        problems = []
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *problems,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        # One write for each line: PrintLogger makes two, and another process may write to the same stderr in between.
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _Lossy(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_has_no_metadata)
