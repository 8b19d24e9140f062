"""Workers on other hosts than the router, and what a network does between them: delay, loss, and no way through."""

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache

import pytest

from tests.e2e.asking import Asking
from tests.e2e.cluster import Cluster
from tests.e2e.hosts import Host, why_not
from tests.e2e.tiny import prompt, tiny_cluster
from twostroke import Client, Unavailable

REASON = why_not()

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(REASON), reason=REASON),
]

# Turns so small that a long prompt takes a second.
PREFILL_FLAGS = {"max-batch-tokens": 8}
LONG, SHORT = tuple(prompt(1_200)), tuple(prompt(30, seed=1))

# A peer that answers no pings is noticed after four seconds (common/network/grpc_options.py), and then some for the
# machine.
NOTICED_SECONDS = 4.0 + 2.0
CALLER_NOTICED_SECONDS = 10.0 + 2.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with Host() as first, Host() as second:
        yield first, second


@pytest.fixture(scope="module")
def cluster(hosts: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    of_workers = {f"{role}-{index}": host for index, host in enumerate(hosts) for role in ("prefill", "decode")}
    with tiny_cluster(
        tmp_path_factory.mktemp("tiny"),
        prefill=2,
        decode=2,
        prefill_flags=PREFILL_FLAGS,
        hosts=of_workers,
        metrics=True,
    ) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _healed(hosts: tuple[Host, Host]) -> Iterator[None]:
    yield
    for host in hosts:
        host.heal()


@cache
def undisturbed(client: Client, tokens: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    answer = client.generate(tokens, max_tokens=max_tokens, temperature=0, ignore_eos=True, timeout=60)
    return answer.token_ids


def assert_answered(cluster: Cluster, asking: Asking, tokens: tuple[int, ...], max_tokens: int) -> None:
    asking.join(timeout=60)
    assert asking.error is None
    assert tuple(asking.tokens) == undisturbed(cluster.client, tokens, max_tokens)


def assert_well(cluster: Cluster, hosts: tuple[Host, Host]) -> None:
    """Healed, the workers come back within seconds, and hold nothing; the next request is served."""
    for host in hosts:
        host.heal()
    cluster.wait_until_ready()
    cluster.assert_blocks_home()
    for asking in [Asking(cluster.client, SHORT, max_tokens=8) for _ in range(4)]:
        assert_answered(cluster, asking, SHORT, 8)
    cluster.assert_blocks_home()


def held_on(cluster: Cluster, host: Host, part: str) -> float:
    """What a worker says that it holds, asked on its own host: there is no way to it from here."""
    port = cluster.metrics_ports[part]
    code = f"import urllib.request as u; print(u.urlopen('http://{host.address}:{port}/metrics').read().decode())"
    page = subprocess.run(host.command([sys.executable, "-c", code]), capture_output=True, text=True, check=True).stdout
    gauges = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("twostroke_"))
    names = ["twostroke_waiting", "twostroke_running", 'twostroke_blocks{state="in_use"}']
    return sum(float(gauges[name]) for name in names)


def busy_host(cluster: Cluster, role: str) -> int:
    """Which of the hosts has something to do in this role."""
    busy = {worker.address for worker in cluster.workers(role) if worker.running}
    (name,) = [name for name, address in cluster.addresses(role).items() if address in busy]
    return int(name[-1])


def under_way(cluster: Cluster, state: str) -> tuple[Asking, tuple[int, ...], int, int]:
    """A request in `state`, its prompt and tokens, and the host that has it."""
    tokens, max_tokens = (LONG, 20) if state == "prefilling" else (SHORT, 2_500)
    undisturbed(cluster.client, tokens, max_tokens)
    cluster.assert_blocks_home()  # so that who is busy from now on has this request
    asking = Asking(cluster.client, tokens, max_tokens=max_tokens)
    if state == "decoding":
        cluster.wait_for(lambda: len(asking.tokens) > 3)
    role = "prefill" if state == "prefilling" else "decode"
    cluster.wait_for(lambda: any(worker.running for worker in cluster.workers(role)))
    return asking, tokens, max_tokens, busy_host(cluster, role)


@pytest.mark.parametrize("ways", ["both ways", "outward"])
@pytest.mark.parametrize("state", ["prefilling", "decoding"])
def test_what_a_cut_off_host_had_goes_on_at_another(
    cluster: Cluster, hosts: tuple[Host, Host], state: str, ways: str
) -> None:
    asking, tokens, max_tokens, index = under_way(cluster, state)
    host = hosts[index]
    cut = time.monotonic()
    if ways == "both ways":
        host.cut()
    else:
        host.outward.cut = True
    cluster.wait_for(lambda: len(cluster.workers("prefill")) == len(cluster.workers("decode")) == 1, NOTICED_SECONDS)
    assert_answered(cluster, asking, tokens, max_tokens)
    assert asking.resumes in (1, 2)  # of the two workers there, one may be noticed later, and be chosen again before
    for role in ("prefill", "decode"):  # cut off still, they have noticed, too
        while held := held_on(cluster, host, f"{role}-{index}"):
            assert time.monotonic() < cut + NOTICED_SECONDS + 2, held
    assert_well(cluster, hosts)


def test_with_every_host_cut_off_the_answer_is_unavailable_within_seconds(
    cluster: Cluster, hosts: tuple[Host, Host]
) -> None:
    asking, *_ = under_way(cluster, "decoding")
    cut = time.monotonic()
    for host in hosts:
        host.cut()
    asking.join(timeout=30)
    assert isinstance(asking.error, Unavailable)
    assert time.monotonic() - cut < NOTICED_SECONDS + 1.5  # --worker-grace
    with pytest.raises(Unavailable):
        cluster.client.generate(SHORT, max_tokens=1)
    assert_well(cluster, hosts)


def test_a_short_cut_loses_nothing(cluster: Cluster, hosts: tuple[Host, Host]) -> None:
    instances = {worker.instance for worker in cluster.client.load().workers}
    asking, tokens, max_tokens, index = under_way(cluster, "decoding")
    hosts[index].cut()
    time.sleep(1)
    hosts[index].heal()
    assert_answered(cluster, asking, tokens, max_tokens)
    assert asking.resumes == 0
    assert instances == {worker.instance for worker in cluster.client.load().workers}
    assert_well(cluster, hosts)


@pytest.mark.parametrize(("delay_seconds", "loss"), [(0.1, 0.0), (0.0, 0.02), (0.02, 0.02)])
def test_a_slow_or_lossy_way_loses_no_request(
    cluster: Cluster, hosts: tuple[Host, Host], delay_seconds: float, loss: float
) -> None:
    tokens = (SHORT, tuple(prompt(200, seed=2)), LONG)
    for question in tokens:
        undisturbed(cluster.client, question, 40)
    for host in hosts:
        for way in (host.outward, host.inward):
            way.delay_seconds, way.loss = delay_seconds, loss
    asked = [(question, Asking(cluster.client, question, max_tokens=40)) for question in tokens for _ in range(4)]
    for question, asking in asked:
        assert_answered(cluster, asking, question, 40)
        if not loss:
            assert asking.resumes == 0
    assert_well(cluster, hosts)


def test_a_cut_off_client_holds_its_places_for_seconds_only(cluster: Cluster, hosts: tuple[Host, Host]) -> None:
    code = (
        "import sys; from twostroke import Client, TwostrokeError\n"
        "stream = Client(sys.argv[1]).stream([5, 6, 7], max_tokens=4_000, ignore_eos=True, temperature=0)\n"
        "print(next(stream).prompt.prompt_tokens, flush=True)\n"
        "try: print(sum(len(piece.token_ids) for piece in stream))\n"
        "except TwostrokeError as error: print(error.code.name)\n"
    )
    target = cluster.target.replace("127.0.0.1", "")
    with Host() as host:
        command = host.command([sys.executable, "-c", code, f"{host.here}{target}"])
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "3\n"
            cluster.wait_for(lambda: any(worker.running for worker in cluster.workers("decode")))
            host.cut()
            cluster.wait_for(lambda: cluster.client.load().running == 0, CALLER_NOTICED_SECONDS)
            assert_well(cluster, hosts)
            host.heal()
            assert client.stdout.readline() == "UNAVAILABLE\n"
