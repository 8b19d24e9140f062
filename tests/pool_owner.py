"""A prefill worker as far as its pool goes, in a process of its own: for tests of the transports."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import torch

from common.kv.kv_pool import KvLayout
from tests.e2e.hosts import Host

_PROGRAM = """
import json, sys, torch
from common import transport
from common.kv.block_pool import BlockPool
from common.kv.kv_pool import KvLayout, view

name, device, instance, layout, fill = sys.argv[1:]
device, layout = torch.device(device), KvLayout(**json.loads(layout))
memory = transport.create(name, layout, device, instance)
pool, blocks = view(memory.tensor, layout), BlockPool(layout.num_blocks, memory.generations)
held = blocks.allocate(layout.num_blocks)

def tell(line):
    if pool.is_cuda:
        torch.cuda.synchronize()
    print(line, flush=True)

exec(fill)
tell(memory.descriptor.decode())
for command in sys.stdin:
    if command == "reuse\\n":
        blocks.release(held[5:6])
        (block,) = blocks.allocate(1)
        pool[block] = 0
        tell(block)
    elif command == "spoil\\n":  # of nixl: the probe lies behind the pool, in the same memory
        storage = memory.tensor.untyped_storage()
        storage[len(storage) - 1] ^= 1
        tell("spoilt")
    elif command == "close\\n":
        memory.close()
        print("closed", flush=True)
"""


class PoolOwner:
    """Owns a pool of `layout`, and does to it what it is told: it answers each one-word command with a line. `fill` is
    Python that fills its `pool`. On `host`, if one is given."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        instance: str,
        layout: KvLayout,
        fill: str,
        host: Host | None = None,
    ) -> None:
        arguments = [name, str(device), instance, json.dumps(asdict(layout)), fill]
        command = [sys.executable, "-c", _PROGRAM, *arguments]
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
