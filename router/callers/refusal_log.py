"""Log lines of refused calls, of which anyone can make any number."""

import time
from collections import Counter

import structlog

from router.errors import CallError

log = structlog.get_logger(__name__)

# Between two lines of one kind. The metrics count every call.
PAUSE_SECONDS = 1.0


class RefusalLog:
    def __init__(self) -> None:
        self._logged_at: dict[str, float] = {}  # time.monotonic() by kind
        self._left_out: Counter[str] = Counter()  # by kind, since its last line

    def tell(self, kind: str, method: str, error: CallError) -> None:
        """Logs the refusal, unless another of its kind has just been. There must not be many kinds."""
        now = time.monotonic()
        if now - self._logged_at.get(kind, -PAUSE_SECONDS) < PAUSE_SECONDS:
            self._left_out[kind] += 1
            return
        self._logged_at[kind] = now
        more = {"left_out": left_out} if (left_out := self._left_out.pop(kind, 0)) else {}
        log.info("call refused", method=method, code=error.code.name, reason=error.message, **more)
