"""A part's certificate files, watched while it runs: renewed ones apply from the next connection on."""

import threading
import time
from datetime import UTC, datetime

import structlog

from common.security import file_state, pem
from common.security.pem import Pem
from common.security.security_config import SecurityConfig, SettingsError

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0


class Certificates:
    """
    Args:
        config: which files.

    Raises:
        SettingsError: a file is missing or wrong, as `pem.read` says.
    """

    def __init__(self, config: SecurityConfig) -> None:
        self._config = config
        files = (config.tls_cert, config.tls_key, config.tls_ca, config.tls_client_ca)
        self._files = [path for path in files if path is not None]
        self._lock = threading.Lock()
        self._look_at = time.monotonic() + LOOK_SECONDS
        self._problem: str | None = None
        self._taken = self._state()
        self._pem = pem.read(config)

    def now(self) -> Pem:
        """What the files held when they were last right. Checks for changes at most once a second. Safe from any
        thread."""
        with self._lock:
            if time.monotonic() >= self._look_at:
                self._look_at = time.monotonic() + LOOK_SECONDS
                self._look()
            return self._pem

    def _look(self) -> None:
        state = self._state()
        if state == self._taken:
            self._problem = None
            return
        found = problem = None
        try:
            found = pem.read(self._config)
        except (SettingsError, OSError) as error:
            problem = str(error)
        # Files are renewed one after another, so the key may already belong to the next certificate.
        if self._state() != state:
            return
        if found is not None:
            self._pem, self._taken = found, state
            log.info("certificates read again", expires=_date(found.own.expires if found.own else None))
        elif problem != self._problem:
            log.error("the certificates stay as they were", reason=problem)
        # Wrong files are read again at every check, changed or not: their permissions may have been mended.
        self._problem = problem

    def _state(self) -> list[file_state.State | None]:
        return [file_state.of(path) for path in self._files]


def _date(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
