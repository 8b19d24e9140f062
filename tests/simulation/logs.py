"""Logs of the code under test: nobody reads them, but for exceptions. Parts survive those at the cost of one request;
the simulation does not."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from structlog.typing import EventDict


@contextmanager
def only_exceptions() -> Iterator[None]:
    """Raises what is logged as an exception where it is logged."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR), processors=[_raise_exceptions]
    )
    try:
        yield
    finally:
        structlog.configure(**before)


def _raise_exceptions(_logger: object, _method: str, event: EventDict) -> EventDict:
    if event.get("exc_info") and (error := sys.exception()) is not None:
        raise error
    raise structlog.DropEvent
