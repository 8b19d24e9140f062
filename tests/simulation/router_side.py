"""Routers: a real dispatcher each, the requests that it took, who reads their answers, and the circuit breakers of its
workers."""

import random
from collections import defaultdict

from router.cluster.circuit import Circuit
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.request import Request, State
from router.metrics import Metrics
from tests.simulation.readers import SharedCall
from tests.simulation.setting import Setting


class RouterSide:
    """To be made while its event loop runs."""

    def __init__(self, setting: Setting, rng: random.Random) -> None:
        self.dispatcher = Dispatcher(setting.router(rng), Metrics())
        self.dispatcher.workers.watch()
        self.circuits: defaultdict[str, Circuit] = defaultdict(Circuit)  # by address
        self.requests: list[Request] = []
        self.caller = SharedCall()

    @property
    def at_rest(self) -> bool:
        """All are answered, and it knows it."""
        waiting = self.dispatcher.queued or self.dispatcher.running or self.dispatcher.queued_prompt_tokens
        return not waiting and not any(it.state in (State.QUEUED, State.DISPATCHED) for it in self.requests)
