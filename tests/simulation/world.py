"""A cluster with its callers and its mishaps: all of it in one thread and in virtual time, drawn from one seed."""

import asyncio
import itertools
import random
from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch

from router.cluster.workers import PREFILL, ROLE_NAMES
from router.dispatch.request import Request
from router.errors import CallError
from tests.simulation import faults, invariants, load, logs, readers, setting
from tests.simulation.clock import Clock
from tests.simulation.host import DecodeHost, Host, PrefillHost
from tests.simulation.host_memories import HostMemories
from tests.simulation.link import Link
from tests.simulation.model import Model
from tests.simulation.reads import Pools
from tests.simulation.reference import Reference
from tests.simulation.router_side import RouterSide
from tests.simulation.tasks import Tasks
from tests.simulation.traffic import Traffic

BUSY_TICKS = 360  # in which callers ask, and things go wrong
MOST_TICKS = 20_000  # until all are answered, and nothing is held
LAST_TICKS, LAST_TICK_SECONDS = 200, 0.05  # for what is let go of after a time, and must not be needed


def run(seed: int, model: Model, traffic: Traffic) -> None:
    """The same seed gives the same run, in every process.

    Args:
        seed: what everything is drawn from.
        model: of the workers.
        traffic: is told what was said and done.

    Raises:
        AssertionError: something did not hold.
        Exception: a part could not go on.
    """
    rng, clock = random.Random(seed), Clock()
    with (
        clock.in_charge(),
        logs.only_exceptions(),
        torch.random.fork_rng(devices=[]),
        mock.patch("router.dispatch.attempts.random", rng),  # makes their ids
        readers.settling_early(),
    ):
        torch.manual_seed(seed)  # for what is in pools at first
        world = World(rng, clock, model, traffic)
        with (
            mock.patch("decode_worker.peer_pools.ThreadPoolExecutor", return_value=world.tasks),
            mock.patch("decode_worker.peer_pools.open_peer", world.pools.open),
        ):
            asyncio.run(world.run())


class World:
    def __init__(self, rng: random.Random, clock: Clock, model: Model, traffic: Traffic) -> None:
        self._rng = rng
        self._clock = clock
        self._model = model
        self._traffic = traffic
        self._setting = setting.draw(rng)
        self._serials = itertools.count()
        self._hosts: dict[str, Host] = {}  # by address
        self._links: list[Link] = []
        self._routers: list[RouterSide] = []
        self._reference = Reference(model)
        self.tasks = Tasks(0.5, rng)
        self.pools = Pools(self._setting.failing_reads, rng)
        self._memories = HostMemories(rng)

    async def run(self) -> None:
        self._routers = [RouterSide(self._setting, self._rng) for _ in range(self._setting.routers)]
        for _ in range(BUSY_TICKS):
            self._ask()
            if self._setting.faults:
                faults.strike([*self._hosts.values()], self._links, self._traffic.counts, self._rng)
            await self._tick(restart=0.2)
        await self._come_to_rest()
        for _ in range(LAST_TICKS):
            self._clock.go_on(LAST_TICK_SECONDS)
            await self._tick()
        self._check_rest()
        self._count_ends()

    # ------------------------------------------------------------ callers

    def _requests(self) -> Iterator[Request]:
        return (request for router in self._routers for request in router.requests)

    def _ask(self) -> None:
        if self._likely(0.25):
            choices = load.draw(self._rng, self._serials, plain=self._setting.plain)
            self._reference.answer_first(choices)
            router = self._rng.choice(self._routers)
            try:
                router.dispatcher.submit(choices)
                router.requests += choices
            except CallError:
                self._traffic.counts["requests turned away"] += len(choices)

    def _leave(self) -> None:
        """Callers do, or a stop string has ended one choice of theirs."""
        router = self._rng.choice(self._routers)
        if router.requests and self._likely(0.05):
            one = self._rng.choice(router.requests)
            all_choices = [request for request in router.requests if request.id == one.id]
            router.dispatcher.drop(all_choices if self._likely(0.5) else [one])

    # ------------------------------------------------------------ parts

    def _start_hosts(self, restart: float) -> None:
        for role, slot in self._setting.slots:
            address = f"{ROLE_NAMES[role]}-{slot}"
            if address not in self._hosts and self._likely(restart):
                kind = PrefillHost if role == PREFILL else DecodeHost
                model = self._model.with_grammars(self.tasks)
                host = kind(address, next(self._serials), model, self._setting, self._memories, self._rng)
                self._hosts[address] = host
                self.pools.add(host)

    def _connect(self, host: Host) -> None:
        """Routers that are not connected to its address may be from now on."""
        connected = [link.router for link in self._links if link.router_open and link.host.address == host.address]
        for router in self._routers:
            if router not in connected and self._likely(0.1):
                self._links.append(Link(router, host, self._traffic, self._rng))

    async def _tick(self, restart: float = 1.0) -> None:
        """Everybody may do something, in any order."""
        self._clock.go_on(self._rng.choice([0, 0.0005, 0.005, 0.03]))
        self._start_hosts(restart)
        self._leave()
        await asyncio.sleep(0)  # what routers have put off, and their timers
        self.tasks.go_on()
        self.pools.go_on()
        self._memories.go_on()
        for host in self._rng.sample([*self._hosts.values()], len(self._hosts)):
            if not host.dead and self._likely(0.7):
                host.turn(partial(self._connect, host))
                invariants.blocks_add_up(host)
            host.dead = host.dead or (host.draining and host.idle and self._likely(0.3))
        self._hosts = {address: host for address, host in self._hosts.items() if not host.dead}
        for link in self._rng.sample(self._links, len(self._links)):
            await link.go_on()
            invariants.account_is_possible(link)
        self._links = [link for link in self._links if not link.over]
        for router in self._routers:
            router.caller.read(router.requests)
        if self._likely(0.05):
            self._check_contents()

    def _check_contents(self) -> None:
        for host in self._hosts.values():
            invariants.hashes_are_true(host, self._reference)
        invariants.answers_are_right(self._requests(), self._reference)

    # ------------------------------------------------------------ the end

    async def _come_to_rest(self) -> None:
        for _ in range(MOST_TICKS):
            await self._tick()
            restless = [host.address for host in self._hosts.values() if not host.idle]
            restless += [f"a link to {link.host.address}" for link in self._links if not link.at_rest]
            restless += ["a router" for router in self._routers if not router.at_rest]
            if not restless:
                return
        raise AssertionError(f"there is no end to the work of {', '.join(restless)}")

    def _check_rest(self) -> None:
        self._check_contents()
        for host in self._hosts.values():
            invariants.nothing_is_held(host)
        for link in self._links:
            invariants.account_is_even(link)
        for router in self._routers:
            invariants.callers_know_all(router)
        invariants.failures_are_due(self._requests(), self._setting.patient)

    def _count_ends(self) -> None:
        counts = self._traffic.counts
        for request in self._requests():
            counts[f"requests {request.state.name.lower()}"] += 1
            counts["requests resumed"] += request.resumes > 0
            counts["requests guided"] += request.prompt.grammar != ""
            counts["tokens"] += len(request.output)
        counts["streams settled"] += sum(router.caller.settled for router in self._routers)
        counts["loads"] += self._memories.loads

    def _likely(self, chance: float) -> bool:
        return self._rng.random() < chance
