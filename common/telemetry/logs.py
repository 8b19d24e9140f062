"""Log lines for people or for machines, by structlog."""

import logging
import sys
from typing import Literal

import structlog


def configure(log_format: Literal["people", "json"]) -> None:
    """Sets up this process's log: one line an event on stderr, with time and level.

    Fields bound with `structlog.contextvars`, such as a request's id, are in every line of their task. Prompts and
    tokens are never logged. Warnings and errors of the standard library's loggers go to stderr as they are.
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
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
