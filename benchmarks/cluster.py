"""A router and workers as processes of this machine, for the duration of a `with` block."""

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
    """Flags are named as on the command line, without leading dashes: {"num-blocks": 64}. Logs go to `logs`.

    Raises:
        RuntimeError: on entry, if a part ends or the cluster is not ready in time; with the end of the logs.
    """

    router: Flags
    workers: Sequence[tuple[str, Flags]]  # ("prefill_worker" or "decode_worker", its flags); may be empty
    logs: Path
    start_seconds: float = 180.0
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.target = f"127.0.0.1:{free_port()}"
        self.logs.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(self._stop)
            self._start("router", "router", {"listen": self.target, **self.router})
            for index, (module, flags) in enumerate(self.workers):
                self._start(f"{module}-{index}", module, {"router": self.target, **flags})
            self._wait_until_ready()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def _start(self, name: str, module: str, flags: Flags) -> None:
        arguments = [f"--{flag}={value}" for flag, value in flags.items()]
        with (self.logs / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        with Client(self.target) as client:
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
