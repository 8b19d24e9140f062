"""Whether a cluster that was started is ready, and if not, why."""

import time
from collections.abc import Callable

from twostroke import Client, TwostrokeError
from twostroke.v1 import inference_pb2 as pb

# The router retries a worker that does not fit, or that cannot read another's KV, every five seconds. A problem that
# has lasted for three tries is not about to go away.
LASTING_SECONDS = 15.0

# gRPC's words for an address at which nobody listens yet; the latter for a Unix socket.
NOT_LISTENING = ("Connection refused", "No such file")

ROLES = {pb.WORKER_ROLE_PREFILL: "prefill", pb.WORKER_ROLE_DECODE: "decode"}


def problems_of(load: pb.GetLoadResponse) -> list[str]:
    """A sentence for each worker that is there but not fully usable."""
    return [f"{ROLES.get(problem.role)} worker {problem.address} {problem.reason}" for problem in load.problems]


class Readiness:
    """
    Args:
        client: calls the router.
        workers: how many there must be.
        why_silent: why the router that was started, and not another at the same address, does not answer; None if it
            does.
    """

    def __init__(self, client: Client, workers: int, why_silent: Callable[[], str | None]) -> None:
        self._client = client
        self._workers = workers
        self._why_silent = why_silent
        self._found = False
        self._since: dict[str, float] = {}  # of each problem that there is: time.monotonic()

    def look(self) -> tuple[str | None, list[str]]:
        """The model's name, once the router's health is SERVING and every worker takes requests; and the problems that
        are new since the last look."""
        if not self._found:
            if (reason := self._why_silent()) is not None:
                # What else goes wrong with a connection, such as TLS, will not change.
                broken = "UNAVAILABLE" in reason and not any(words in reason for words in NOT_LISTENING)
                return None, self._new([f"the router cannot be called at {reason}"] if broken else [])
            self._found, self._since = True, {}
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
        return None, self._new(problems_of(load))

    def _new(self, problems: list[str]) -> list[str]:
        """Those that there were not at the last look."""
        known, now = self._since, time.monotonic()
        self._since = {problem: known.get(problem, now) for problem in problems}
        return [problem for problem in problems if problem not in known]

    def close(self) -> None:
        """To be called once the cluster is ready: left open, the client would notice that the router goes."""
        self._client.close()

    def lasting_problem(self) -> str | None:
        """A problem that has lasted too long to go away, if there is one."""
        long_ago = time.monotonic() - LASTING_SECONDS
        return next((problem for problem, since in self._since.items() if since < long_ago), None)
