"""Two routers that know nothing of each other, in front of the same two pairs of workers: parts are stopped, killed and
restarted under load. Whatever was done, every answer is the one that it would have been, and all blocks come home."""

import itertools
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import pytest

from common.probe import probe
from tests.e2e.asking import Asking
from tests.e2e.cluster import Cluster
from tests.e2e.tiny import prompt, tiny_cluster
from twostroke import Client, Generation, Unavailable

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(120)]

# Turns so small that a long prompt takes a second, and that with one on each prefill worker the next has to wait.
PREFILL_FLAGS = {"max-batch-tokens": 8}
LONG, SHORT = prompt(1_200), prompt(30, seed=1)

# So that draining ends what is under way on a busy machine, too.
PATIENCE = {"drain-seconds": 60}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("tiny")
    with tiny_cluster(
        directory,
        prefill=2,
        decode=2,
        routers=2,
        worker_flags=PATIENCE,
        prefill_flags=PREFILL_FLAGS,
        router_flags=PATIENCE,
    ) as cluster:
        yield cluster


def ask(client: Client, tokens: Sequence[int], max_tokens: int, salt: str = "") -> Generation:
    return client.generate(tokens, max_tokens=max_tokens, temperature=0, ignore_eos=True, cache_salt=salt, timeout=60)


@cache
def undisturbed(client: Client, tokens: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    return ask(client, tokens, max_tokens).token_ids


def assert_answered(cluster: Cluster, asking: Asking, tokens: Sequence[int], max_tokens: int) -> None:
    asking.join(timeout=60)
    assert asking.error is None
    assert tuple(asking.tokens) == undisturbed(cluster.clients[1], tuple(tokens), max_tokens)


def assert_well(cluster: Cluster) -> None:
    for client in cluster.clients:
        cluster.assert_blocks_home(client=client)
        assert ask(client, SHORT, 8).token_ids == undisturbed(cluster.clients[1], tuple(SHORT), 8)
        cluster.assert_blocks_home(client=client)


class InAllStates:
    """Requests at one router: two decode, two prompts are being computed, two wait in the router's queue."""

    def __init__(self, cluster: Cluster) -> None:
        client = cluster.clients[0]
        self._cluster = cluster
        self.decoding = [Asking(client, SHORT, max_tokens=1_000) for _ in range(2)]
        cluster.wait_for(lambda: all(len(asking.tokens) > 3 for asking in self.decoding))
        self.prompts = [Asking(client, LONG, max_tokens=20) for _ in range(4)]
        cluster.wait_for(lambda: client.load().queued == 2 and client.load().running == 4)

    @property
    def all(self) -> list[Asking]:
        return [*self.decoding, *self.prompts]

    def assert_answered(self) -> None:
        for asking in self.decoding:
            assert_answered(self._cluster, asking, SHORT, 1_000)
        for asking in self.prompts:
            assert_answered(self._cluster, asking, LONG, 20)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_stopped_worker_is_noticed_and_what_it_had_goes_on_elsewhere(parts: Cluster, role: str) -> None:
    requests = InAllStates(parts)
    parts.signal(f"{role}-0", signal.SIGSTOP)
    try:
        requests.assert_answered()
        assert any(asking.resumes for asking in requests.all)
        if role == "prefill":
            assert not any(asking.resumes for asking in requests.decoding)
        assert len(parts.workers(role)) == 1
    finally:
        parts.signal(f"{role}-0", signal.SIGCONT)
    parts.wait_until_ready()
    assert_well(parts)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_what_a_killed_worker_had_goes_on_elsewhere_and_its_successor_is_another(parts: Cluster, role: str) -> None:
    address = parts.addresses(role)[f"{role}-0"]
    (killed,) = [worker.instance for worker in parts.workers(role) if worker.address == address]
    requests = InAllStates(parts)
    parts.kill(f"{role}-0")
    parts.start_worker(role, 0)
    requests.assert_answered()
    assert any(asking.resumes for asking in requests.all)
    parts.wait_until_ready()
    for client in parts.clients:
        assert killed not in {worker.instance for worker in parts.workers(role, client)}
    assert_well(parts)


def in_transfer(cluster: Cluster) -> tuple[Asking, str, str]:
    """A request whose KV waits to be taken, and the names of its workers: the decode worker was stopped after it had
    reserved and before it could begin to pull."""
    asking = Asking(cluster.clients[0], LONG, max_tokens=20)

    def busy(role: str, count: str) -> list[str]:
        addresses = {worker.address for worker in cluster.workers(role) if getattr(worker, count)}
        return [name for name, address in cluster.addresses(role).items() if address in addresses]

    cluster.wait_for(lambda: bool(busy("prefill", "running") and busy("decode", "waiting")))
    (prefill,), (decode,) = busy("prefill", "running"), busy("decode", "waiting")
    cluster.signal(decode, signal.SIGSTOP)
    cluster.wait_for(lambda: busy("prefill", "leases") == [prefill])
    return asking, prefill, decode


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_is_killed_while_kv_is_handed_over(parts: Cluster, role: str) -> None:
    asking, prefill, decode = in_transfer(parts)
    victim = prefill if role == "prefill" else decode
    parts.kill(victim)
    if role == "prefill":
        parts.signal(decode, signal.SIGCONT)
    assert_answered(parts, asking, LONG, 20)
    parts.start_worker(role, int(victim[-1]))
    parts.wait_until_ready()
    assert_well(parts)


def test_a_decode_worker_is_stopped_while_kv_is_handed_over(parts: Cluster) -> None:
    asking, _, decode = in_transfer(parts)
    try:
        assert_answered(parts, asking, LONG, 20)
        assert asking.resumes == 1
    finally:
        parts.signal(decode, signal.SIGCONT)
    parts.wait_until_ready()
    assert_well(parts)


def test_kv_of_a_stopped_prefill_worker_is_taken_all_the_same(parts: Cluster) -> None:
    asking, prefill, decode = in_transfer(parts)
    parts.signal(prefill, signal.SIGSTOP)
    try:
        parts.signal(decode, signal.SIGCONT)
        assert_answered(parts, asking, LONG, 20)
        assert asking.resumes == 0
    finally:
        parts.signal(prefill, signal.SIGCONT)
    parts.wait_until_ready()
    assert_well(parts)


def test_a_router_is_killed_while_kv_is_handed_over(parts: Cluster) -> None:
    asking, _, decode = in_transfer(parts)
    parts.kill("router-0")
    parts.signal(decode, signal.SIGCONT)
    asking.join(timeout=10)
    assert isinstance(asking.error, Unavailable)
    parts.assert_blocks_home(client=parts.clients[1])
    parts.start_router(0)
    parts.wait_until_ready()
    assert_well(parts)


def test_a_router_is_stopped_while_kv_is_handed_over(parts: Cluster) -> None:
    asking, _, decode = in_transfer(parts)
    parts.signal("router-0", signal.SIGSTOP)
    try:
        parts.signal(decode, signal.SIGCONT)
        # the workers take it for gone, and keep nothing for it
        parts.assert_blocks_home(seconds=10, client=parts.clients[1])
    finally:
        parts.signal("router-0", signal.SIGCONT)
    assert_answered(parts, asking, LONG, 20)
    parts.wait_until_ready()
    assert_well(parts)


def test_a_stopped_router_loses_its_places_and_its_requests_go_on_when_it_does(parts: Cluster) -> None:
    requests = InAllStates(parts)
    parts.signal("router-0", signal.SIGSTOP)
    try:
        parts.assert_blocks_home(seconds=10, client=parts.clients[1])
        assert ask(parts.clients[1], SHORT, 8).finish.usage.resumes == 0
    finally:
        parts.signal("router-0", signal.SIGCONT)
    requests.assert_answered()
    assert any(asking.resumes for asking in requests.all)
    parts.wait_until_ready()
    assert_well(parts)


@contextmanager
def load(client: Client, answers: list[Generation], callers: int = 4) -> Iterator[None]:
    """As long as it lasts, so many callers ask one question after the other; whatever one of them is told but an answer
    ends it, and is raised at the end."""
    over = threading.Event()
    problems: list[BaseException] = []
    serials = itertools.count()

    def call() -> None:
        try:
            while not over.is_set():
                serial = next(serials)
                answers.append(ask(client, prompt(20 + 40 * (serial % 4)), 40, salt=str(serial)))
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if problems:
        raise problems[0]


def assert_all_undisturbed(cluster: Cluster, answers: Sequence[Generation]) -> None:
    expected = {20 + 40 * kind: undisturbed(cluster.clients[1], tuple(prompt(20 + 40 * kind)), 40) for kind in range(4)}
    assert all(answer.token_ids == expected[answer.prompt.prompt_tokens] for answer in answers)


def test_a_killed_router_takes_only_its_own_requests_with_it(parts: Cluster) -> None:
    answers: list[Generation] = []
    with load(parts.clients[1], answers):
        requests = InAllStates(parts)
        parts.kill("router-0")
        killed = time.monotonic()
        for asking in requests.all:
            asking.join(timeout=10)
            assert isinstance(asking.error, Unavailable)
        assert time.monotonic() - killed < 2
        before = len(answers)
        parts.wait_for(lambda: len(answers) > before + 20, seconds=20)
    assert_all_undisturbed(parts, answers)
    assert all(answer.finish.usage.resumes == 0 for answer in answers)
    parts.assert_blocks_home(client=parts.clients[1])
    parts.start_router(0)
    parts.wait_until_ready()
    assert_well(parts)


@pytest.mark.parametrize("part", ["prefill-0", "decode-0", "router-0"])
def test_a_draining_part_says_so_first_and_ends_what_it_has(parts: Cluster, part: str) -> None:
    requests = InAllStates(parts)
    role = part.partition("-")[0]
    address = parts.targets[0] if role == "router" else parts.addresses(role)[part]
    service = "twostroke.v1.Inference" if role == "router" else "twostroke.v1.Worker"
    assert probe(address, service) is None
    parts.signal(part, signal.SIGTERM)
    parts.wait_for(lambda: probe(address, service) is not None, seconds=1)
    assert parts.processes[part].poll() is None, "nothing was under way that it could have waited for"
    requests.assert_answered()
    assert all(asking.resumes == 0 for asking in requests.all)
    assert parts.processes[part].wait(timeout=60) == 0
    if role == "router":
        parts.start_router(0)
    else:
        parts.start_worker(role, 0)
    parts.wait_until_ready()
    assert_well(parts)


def test_a_rolling_restart_of_all_workers_loses_no_request(parts: Cluster) -> None:
    """A worker of each role at a time; each comes back at its old address."""
    answers: tuple[list[Generation], list[Generation]] = ([], [])
    instances = {worker.instance for worker in parts.client.load().workers}
    with load(parts.clients[0], answers[0]), load(parts.clients[1], answers[1]):
        for index in range(2):
            names = [f"{role}-{index}" for role in ("prefill", "decode")]
            for name in names:
                parts.signal(name, signal.SIGTERM)
            for name in names:
                assert parts.processes[name].wait(timeout=20) == 0
            for role in ("prefill", "decode"):
                parts.start_worker(role, index)
            parts.wait_for(
                lambda: all(len(parts.workers(r, c)) == 2 for r in ("prefill", "decode") for c in parts.clients), 60
            )
    for client, answered in zip(parts.clients, answers, strict=True):
        assert len(answered) > 20
        assert_all_undisturbed(parts, answered)
        assert instances.isdisjoint(worker.instance for worker in client.load().workers)
    assert_well(parts)
