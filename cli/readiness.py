"""Whether a cluster that was started is ready, and what keeps it from being so."""

import time
from collections.abc import Callable

from twostroke import Client, TwostrokeError
from twostroke.v1 import inference_pb2 as pb

# The router tries a worker that does not fit, or that cannot read another's KV, again every five seconds. What stands
# for so long is not about to change.
LASTING_SECONDS = 15.0

ROLES = {pb.WORKER_ROLE_PREFILL: "prefill", pb.WORKER_ROLE_DECODE: "decode"}


def problems_of(load: pb.GetLoadResponse) -> list[str]:
    """Workers that are there and of no full use, and why: a sentence for each."""
    return [f"{ROLES.get(problem.role)} worker {problem.address} {problem.reason}" for problem in load.problems]


class Readiness:
    """Of the router that `client` calls, and of so many workers; `is_own` asks whether that router is the one that was
    started, and not another one that has its address."""

    def __init__(self, client: Client, workers: int, is_own: Callable[[], bool]) -> None:
        self._client = client
        self._workers = workers
        self._is_own = is_own
        self._found = False
        self._since: dict[str, float] = {}  # of each problem that there is: time.monotonic()

    def look(self) -> tuple[str | None, list[str]]:
        """The model's name, once the router's health is SERVING and every worker takes requests; problems that were not
        there when it looked last."""
        self._found = self._found or self._is_own()
        if not self._found:
            return None, []
        try:
            self._client.wait_until_ready(timeout=1)
            serving = True
        except TwostrokeError:
            serving = False
        try:
            load = self._client.load(timeout=1)
            if serving and sum(worker.ready for worker in load.workers) == self._workers:
                return self._client.model(timeout=1).name, []
        except TwostrokeError:
            return None, []
        known, now = self._since, time.monotonic()
        self._since = {problem: known.get(problem, now) for problem in problems_of(load)}
        return None, [problem for problem in self._since if problem not in known]

    def close(self) -> None:
        """There is no more to ask; open, the client would only see the router go."""
        self._client.close()

    def lasting_problem(self) -> str | None:
        """A problem that has been there for too long to go away."""
        long_ago = time.monotonic() - LASTING_SECONDS
        return next((problem for problem, since in self._since.items() if since < long_ago), None)
