"""Routers: a real dispatcher each, the requests that it was asked, and the circuit breakers of its workers."""

import random
from collections import defaultdict

from router.cluster.circuit import Circuit
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.request import Request, State
from router.errors import CallError
from router.metrics import Metrics
from tests.simulation.setting import Setting


class RouterSide:
    """To be made while its event loop runs."""

    def __init__(self, setting: Setting, rng: random.Random) -> None:
        self.dispatcher = Dispatcher(setting.router(rng), Metrics())
        self.dispatcher.workers.watch()
        self.circuits: defaultdict[str, Circuit] = defaultdict(Circuit)  # by address
        self.requests: list[Request] = []

    def ask(self, choices: list[Request]) -> bool:
        """False: they were turned away."""
        try:
            self.dispatcher.submit(choices)
        except CallError:
            return False
        self.requests += choices
        return True

    @property
    def unanswered(self) -> list[Request]:
        return [request for request in self.requests if request.state in (State.QUEUED, State.DISPATCHED)]
