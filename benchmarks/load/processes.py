"""A load from several client processes, so that no client is the bottleneck."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from typing import TypeAlias

from benchmarks.load.config import LoadConfig
from benchmarks.load.record import Record
from benchmarks.load.run import run
from twostroke import AsyncClient, event_loop

StartLoads: TypeAlias = Callable[[Sequence[LoadConfig], float], list[Future[list[Record]]]]
"""Starts the load of each config. A request that takes longer than so many seconds fails."""


def split(config: LoadConfig, clients: int) -> list[LoadConfig]:
    """Divides the open-loop load of `config` among clients: Poisson processes add up to one with the sum of their
    rates. Each client has a seed of its own, so that no two make the same requests."""
    assert config.rate is not None
    return [
        replace(config, rate=config.rate / clients, seed=config.seed * clients + client) for client in range(clients)
    ]


def start(
    pool: ProcessPoolExecutor, target: str, configs: Sequence[LoadConfig], timeout: float
) -> list[Future[list[Record]]]:
    """Starts each config's load in a process of `pool`, against the router at `target` (host:port). A request that
    takes longer than `timeout` seconds fails."""
    return [pool.submit(run_load, target, config, timeout) for config in configs]


def run_load(target: str, config: LoadConfig, timeout: float) -> list[Record]:
    """The same in this process, to its end."""

    async def load() -> list[Record]:
        async with AsyncClient(target, timeout=timeout, share_call=config.share_call) as client:
            return await run(client, config, lambda _: None)

    return event_loop.run(load())
