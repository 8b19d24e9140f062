"""How calls end: counted, logged and traced."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import structlog

from common.telemetry.tracing import OFF, Span
from router import request_trace
from router.errors import CallError, fault
from router.metrics import Metrics

log = structlog.get_logger(__name__)

# A caller may end a call at its deadline a little before the router's clock says that the deadline has passed.
DEADLINE_TOLERANCE = 0.05  # seconds


@asynccontextmanager
async def accounted(
    metrics: Metrics, method: str, trace: Span = OFF, time_remaining: Callable[[], float | None] = lambda: None
) -> AsyncIterator[None]:
    """Accounts for a call, whose work is the block.

    Args:
        time_remaining: seconds until the caller ends the call; None: it has no deadline.

    Raises:
        CallError: in place of every other error of the block.
    """
    began, problem, cancelled = time.monotonic(), "", False
    code = grpc.StatusCode.CANCELLED
    try:
        yield
        code = grpc.StatusCode.OK
    except asyncio.CancelledError:
        cancelled = True
        left = time_remaining()
        if left is not None and left < DEADLINE_TOLERANCE:
            code, problem = grpc.StatusCode.DEADLINE_EXCEEDED, "the caller's deadline passed"
        raise
    except CallError as error:
        code, problem = error.code, error.message
        log.info("call failed", method=method, code=code.name, reason=error.message)
        raise
    except Exception as error:
        code, problem = grpc.StatusCode.INTERNAL, "a fault of the router"
        log.exception("call failed", method=method)
        raise fault() from error
    finally:
        metrics.calls.labels(method, code.name).inc()
        failed = problem if code in request_trace.FAILURES else ""
        trace.end({"rpc.response.status_code": code.name}, failed)
        if cancelled:
            after_ms = round(1000 * (time.monotonic() - began))
            log.info("call cancelled", method=method, code=code.name, after_ms=after_ms)
