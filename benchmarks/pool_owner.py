"""Another process that owns a KV pool, for benchmarks that read it."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

from common import transport
from common.kv.kv_pool import KvLayout, view


@contextmanager
def pool_owner(name: str, layout: KvLayout, device: torch.device) -> Iterator[bytes]:
    """A descriptor of the other process's pool, which can be read over the transport `name` for as long as a `with`
    lasts."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_own, args=(name, layout, device, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        ours.close()
        process.join(30)


def _own(name: str, layout: KvLayout, device: torch.device, pipe: Connection) -> None:
    memory = transport.create(name, layout, device, f"benchmark-{os.getpid()}")
    view(memory.tensor, layout).normal_()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    pipe.send(memory.descriptor)
    try:
        pipe.recv()
    except EOFError:
        memory.close()
