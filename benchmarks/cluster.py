"""Routers and workers as processes of this machine, for the duration of a `with` block."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from common.network.free_port import free_port
from twostroke import Client, TwostrokeError

Flags = Mapping[str, object]


@dataclass
class Cluster:
    """Flags are named as on the command line, without leading dashes: {"num-blocks": 64}. A tuple is a flag that is
    given more than once. Logs go to `logs`.

    Raises:
        RuntimeError: on entry, if a part ends or the cluster is not ready in time; with the end of the logs.
    """

    router: Flags
    workers: Sequence[tuple[str, Flags]]  # ("prefill_worker" or "decode_worker", its flags); may be empty
    logs: Path
    routers: int = 1
    start_seconds: float = 180.0
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        addresses = tuple(f"127.0.0.1:{free_port()}" for _ in range(self.routers))
        self.target = f"ipv4:{','.join(addresses)}"
        self.logs.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(self._stop)
            for index, address in enumerate(addresses):
                self._start(f"router-{index}", "router", {"listen": address, **self.router})
            for index, (module, flags) in enumerate(self.workers):
                self._start(f"{module}-{index}", module, {"router": addresses, **flags})
            for address in addresses:
                self._wait_until_ready(address)
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def cpu_seconds(self, prefix: str) -> float:
        """Processor time of the parts whose names begin with `prefix`, so far."""
        return sum(_cpu_seconds(process.pid) for name, process in self.processes.items() if name.startswith(prefix))

    def _start(self, name: str, module: str, flags: Flags) -> None:
        arguments = [
            f"--{flag}={value}"
            for flag, given in flags.items()
            for value in (given if isinstance(given, tuple) else (given,))
        ]
        with (self.logs / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _wait_until_ready(self, address: str) -> None:
        deadline = time.monotonic() + self.start_seconds
        with Client(address) as client:
            while True:
                for name, process in self.processes.items():
                    if process.poll() is not None:
                        raise RuntimeError(f"{name} ended with {process.returncode}:\n{self.log(name)[-4000:]}")
                if time.monotonic() > deadline:
                    tails = "\n".join(f"{name}: {self.log(name)[-1500:]}" for name in self.processes)
                    raise RuntimeError(f"the cluster was not ready within {self.start_seconds} s\n{tails}")
                try:
                    client.wait_until_ready(timeout=1)
                    if sum(worker.ready for worker in client.load(timeout=1).workers) >= len(self.workers):
                        return
                    time.sleep(0.1)
                except TwostrokeError:
                    continue

    def _stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = fields[11:13]  # fields 14 and 15 of proc_pid_stat(5)
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
