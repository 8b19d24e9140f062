"""A process that owns a pool and does to it what it is told, one line at a time: for tests of the transports."""

import os
import signal
import subprocess
import sys

from tests.e2e.hosts import Host


class PoolOwner:
    """Runs `program` with `arguments`. Its first line is its pool's descriptor; it answers each command with a
    line. On `host`, if one is given."""

    def __init__(self, program: str, *arguments: str, host: Host | None = None) -> None:
        command = [sys.executable, "-c", program, *arguments]
        self.process = subprocess.Popen(
            host.command(command) if host else command,
            env=os.environ | {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.descriptor = self._line().encode()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._line()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()
