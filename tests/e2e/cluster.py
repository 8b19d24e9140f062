"""Real clusters for tests: a router and workers, each a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.request import urlopen

from common.network.free_port import free_port
from common.transport import sweep
from tests.e2e.forked import Forked
from tests.e2e.hosts import Host
from twostroke import Client, Generation
from twostroke.v1 import inference_pb2 as pb

START_SECONDS = 60.0

ROLES = {"prefill": pb.WORKER_ROLE_PREFILL, "decode": pb.WORKER_ROLE_DECODE}


@dataclass
class Cluster:
    """Flags are named as on the command line, without dashes in front: {"num-blocks": 64}.

    Every process runs torch with one thread: the suite has two cores. A worker has just the blocks that the embedded
    model's longest sequence takes: the kernel zeroes them all at its start, 0.7 MiB each.
    """

    prefill: int = 1
    decode: int = 1
    routers: int = 1
    router_flags: Mapping[str, object] = field(default_factory=dict)
    worker_flags: Mapping[str, object] = field(default_factory=dict)
    prefill_flags: Mapping[str, object] = field(default_factory=dict)
    decode_flags: Mapping[str, object] = field(default_factory=dict)
    hosts: Mapping[str, Host] = field(default_factory=dict)  # of workers that are not on this one, by their names
    metrics: bool = False  # whether each part serves its metrics, at `metrics_ports`
    log: Path | None = None

    def __enter__(self) -> Self:
        self.targets = [f"127.0.0.1:{free_port()}" for _ in range(self.routers)]
        self.clients = [Client(target, timeout=60) for target in self.targets]
        self.target, self.client = self.targets[0], self.clients[0]
        self.processes: dict[str, subprocess.Popen[bytes] | Forked] = {}
        self.metrics_ports: dict[str, int] = {}
        self._addresses: dict[str, str] = {}
        self._log = self.log or Path(os.devnull)
        try:
            for index in range(self.routers):
                self.start_router(index)
            for index in range(self.prefill):
                self.start_worker("prefill", index)
            for index in range(self.decode):
                self.start_worker("decode", index)
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.close()
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
        for process in self.processes.values():
            process.wait()
        sweep()

    def start_router(self, index: int = 0) -> None:
        port = self.targets[index].rpartition(":")[2]
        listen = f"0.0.0.0:{port}" if self.hosts else self.targets[index]
        self._start(f"router-{index}", "router", {"listen": listen, **self.router_flags})

    def start_worker(self, role: str, index: int, **flags: object) -> None:
        own = self.prefill_flags if role == "prefill" else self.decode_flags
        name, routers = f"{role}-{index}", self.targets
        host = self.hosts.get(name)
        # A worker that starts again takes the address of the one before.
        listen = self._addresses.setdefault(name, f"{host.address if host else '127.0.0.1'}:{free_port()}")
        common: dict[str, object] = {"listen": listen, "threads": 1, "num-blocks": 512, "device": "cpu"}
        if host:
            routers = [target.replace("127.0.0.1", host.here) for target in self.targets]
            common["insecure"] = True
        self._start(name, f"{role}_worker", {**common, "router": routers, **self.worker_flags, **own, **flags}, host)

    def _start(self, name: str, module: str, flags: Mapping[str, object], host: Host | None = None) -> None:
        if self.metrics:
            flags = {"metrics-port": self.metrics_ports.setdefault(name, free_port()), **flags}
        arguments = [
            f"--{flag}={value}"
            for flag, values in flags.items()
            for value in (values if isinstance(values, list) else [values])
        ]
        if host or flags.get("device") != "cpu":  # a router imports no torch, and CUDA was not tried after a fork
            command = [sys.executable, "-m", module, *arguments]
            with self._log.open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    host.command(command) if host else command,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        else:
            self.processes[name] = Forked(module, arguments, self._log)

    def wait_until_ready(self, prefill: int | None = None, decode: int | None = None) -> None:
        wanted = {"prefill": prefill or self.prefill, "decode": decode or self.decode}
        for client in self.clients:
            client.wait_until_ready(timeout=START_SECONDS)
        self.wait_for(
            lambda: all(
                len(self.workers(role, client)) >= count for role, count in wanted.items() for client in self.clients
            ),
            START_SECONDS,
        )

    def ask_all(self, asked: Sequence[Sequence[int]], count: int) -> list[Generation]:
        """Greedy answers of `count` tokens each, all in flight at once."""

        def ask(prompt: Sequence[int]) -> Generation:
            return self.client.generate(prompt, max_tokens=count, temperature=0, ignore_eos=True, timeout=250)

        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(ask, asked))

    def metric(self, part: str, sample: str) -> float:
        """What a part's metrics say, by the sample's name and labels as they stand there."""
        with urlopen(f"http://127.0.0.1:{self.metrics_ports[part]}/metrics", timeout=10) as response:
            lines: list[str] = response.read().decode().splitlines()
        (value,) = [line.removeprefix(sample) for line in lines if line.startswith(f"{sample} ")]
        return float(value)

    def workers(self, role: str, client: Client | None = None) -> list[pb.WorkerLoad]:
        """The workers of a role that take requests, as a router sees them: the first, or that of `client`."""
        load = (client or self.client).load()
        return [worker for worker in load.workers if worker.role == ROLES[role] and worker.ready]

    def addresses(self, role: str) -> dict[str, str]:
        """Of the workers of a role, by their names among the processes."""
        return {name: address for name, address in self._addresses.items() if name.startswith(role)}

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].send_signal(number)

    def kill(self, name: str) -> None:
        """As `kill -9`; returns when the process is gone."""
        self.processes[name].kill()
        self.processes[name].wait()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it did not come true within {seconds} s: {self.client.load()}"
            time.sleep(0.02)

    def assert_blocks_home(self, seconds: float = 20.0, client: Client | None = None) -> None:
        """Every block of every worker is free or cached, and nobody holds or waits for anything: as the first router
        sees it, or that of `client`."""

        def home() -> bool:
            load = (client or self.client).load()
            return (
                load.queued == load.running == 0
                and len(load.workers) > 0
                and all(
                    worker.waiting == worker.running == worker.leases == 0
                    and worker.blocks.in_use == worker.blocks.reserved == 0
                    and worker.blocks.free + worker.blocks.cached == worker.blocks.total
                    for worker in load.workers
                )
            )

        self.wait_for(home, seconds)
