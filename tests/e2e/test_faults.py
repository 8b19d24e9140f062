"""What is done to a request and to the workers that hold it, in each of its states. Whatever it was, all blocks come
home and the next request is served."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.asking import LONG, SHORT, Asking, assert_well, reach
from tests.e2e.cluster import Cluster
from tests.e2e.reference import assert_greedy
from tests.e2e.soak.holdings import SHARED, mapped_segments
from twostroke import Client, DeadlineExceeded, TwostrokeError, Unavailable

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

# Chunks so small that the long prompt takes a second or more, and can be caught in the middle.
PREFILL_FLAGS = {"max-batch-tokens": 32}

STATES = ("prefilling", "decoding")


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    with Cluster(prefill_flags=PREFILL_FLAGS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def pairs() -> Iterator[Cluster]:
    with Cluster(prefill=2, decode=2, prefill_flags=PREFILL_FLAGS) as cluster:
        yield cluster


def prompt_of(state: str) -> list[int]:
    return LONG if state == "prefilling" else SHORT


@pytest.mark.parametrize("state", STATES)
def test_the_client_leaves(pair: Cluster, state: str) -> None:
    stream = pair.client.stream(prompt_of(state), max_tokens=400, temperature=0, ignore_eos=True)
    for piece in stream:
        if state == "prefilling" or piece.token_ids:
            break
    stream.close()
    assert_well(pair)


@pytest.mark.parametrize("state", STATES)
def test_the_deadline_passes(pair: Cluster, state: str) -> None:
    with pytest.raises(DeadlineExceeded):
        pair.client.generate(prompt_of(state), max_tokens=4_000, temperature=0, ignore_eos=True, timeout=0.5)
    assert_well(pair)


@pytest.mark.parametrize("state", STATES)
def test_the_client_is_killed(pair: Cluster, state: str) -> None:
    code = (
        "import sys; from twostroke import Client\n"
        "for piece in Client(sys.argv[1]).stream(eval(sys.argv[2]), max_tokens=4_000, ignore_eos=True):\n"
        "    print(len(piece.token_ids), flush=True)\n"
    )
    command = [sys.executable, "-c", code, pair.target, str(prompt_of(state))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        for line in client.stdout:
            if state == "prefilling" or int(line):
                break
        client.kill()
    assert_well(pair)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("state", STATES)
def test_a_worker_is_killed_and_another_goes_on(pairs: Cluster, state: str, role: str) -> None:
    prompt = prompt_of(state)
    asking = Asking(pairs.client, prompt, max_tokens=30)
    reach(pairs, asking, state)
    busy = [worker.address for worker in pairs.workers(role) if worker.running or worker.waiting]
    victim = next((name for name, address in pairs.addresses(role).items() if address in busy), f"{role}-0")
    pairs.kill(victim)
    asking.join(timeout=60)
    assert asking.error is None
    assert_greedy(prompt, asking.tokens)
    assert len(asking.tokens) == 30
    assert_well(pairs)
    pairs.start_worker(role, int(victim.rpartition("-")[2]))
    pairs.wait_until_ready()


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("state", STATES)
def test_the_only_worker_is_killed(pair: Cluster, state: str, role: str) -> None:
    asking = Asking(pair.client, prompt_of(state), max_tokens=60)
    reach(pair, asking, state)
    pair.kill(f"{role}-0")
    killed = time.monotonic()
    if (state, role) == ("decoding", "prefill"):
        with suppress(TwostrokeError):
            pair.client.generate(SHORT, max_tokens=1, cache_salt="elsewhere")
        asking.join(timeout=60)
        assert asking.error is None, "a decoding request needs no prefill worker"
    else:
        asking.join(timeout=30)
        assert isinstance(asking.error, Unavailable)
        assert time.monotonic() - killed < 5.0  # --worker-grace, and what a busy machine adds to it
    pair.start_worker(role, 0)
    pair.wait_until_ready()
    assert_well(pair)


def test_a_dead_prefill_workers_pool_is_not_kept_in_memory(pair: Cluster) -> None:
    pair.client.generate(SHORT, max_tokens=2, cache_salt="pulled")
    decode = Path(f"/proc/{pair.processes['decode-0'].pid}/maps")

    def deleted() -> list[str]:
        return [line for line in decode.read_text().splitlines() if "twostroke-" in line and "(deleted)" in line]

    pair.kill("prefill-0")
    pair.start_worker("prefill", 0)  # its start removes the dead one's segment; a mapping would keep the memory
    pair.wait_until_ready()
    pair.wait_for(lambda: not deleted())
    assert_well(pair)


def test_a_pair_that_shares_no_memory_is_none_and_says_so(pair: Cluster) -> None:
    """As in two containers, each of which has a /dev/shm of its own."""
    (segment,) = mapped_segments(pair.processes["prefill-0"].pid)
    (SHARED / segment).unlink()
    pair.kill("decode-0")
    pair.wait_for(lambda: len(pair.client.load().workers) == 1)
    pair.start_worker("decode", 0)
    pair.wait_for(lambda: len(pair.client.load().workers) == 2, seconds=30)
    with pytest.raises(Unavailable, match=r"cannot read the KV of a prefill worker: .*safe to try again"):
        pair.client.generate(SHORT, max_tokens=2)
    with pytest.raises(DeadlineExceeded):
        pair.client.wait_until_ready(timeout=0.5)
    pair.kill("prefill-0")
    pair.start_worker("prefill", 0)
    pair.wait_until_ready()
    assert_well(pair)


def test_a_stopped_decode_worker_is_noticed_and_its_requests_go_on_elsewhere(pairs: Cluster) -> None:
    asking = Asking(pairs.client, SHORT, max_tokens=60)
    reach(pairs, asking, "decoding")
    busy = [worker.address for worker in pairs.workers("decode") if worker.running]
    (victim,) = [name for name, address in pairs.addresses("decode").items() if address in busy]
    pairs.signal(victim, signal.SIGSTOP)
    try:
        asking.join(timeout=30)
        assert asking.error is None
        assert_greedy(SHORT, asking.tokens)
    finally:
        pairs.signal(victim, signal.SIGCONT)
    pairs.wait_until_ready()
    assert_well(pairs)


def test_a_restarted_router_finds_its_workers_again(pair: Cluster) -> None:
    asking = Asking(pair.client, SHORT)
    reach(pair, asking, "decoding")
    pair.kill("router-0")
    asking.join(timeout=30)
    assert isinstance(asking.error, Unavailable)
    pair.start_router()
    pair.wait_until_ready()
    assert_well(pair)


def test_a_worker_drains_on_sigterm(pairs: Cluster) -> None:
    asking = Asking(pairs.client, SHORT, max_tokens=60)
    reach(pairs, asking, "decoding")
    busy = [worker.address for worker in pairs.workers("decode") if worker.running]
    (victim,) = [name for name, address in pairs.addresses("decode").items() if address in busy]
    pairs.signal(victim, signal.SIGTERM)
    asking.join(timeout=30)
    assert asking.error is None
    assert asking.pieces[-1].finish is not None
    assert asking.pieces[-1].finish.usage.resumes == 0
    assert pairs.processes[victim].wait(timeout=30) == 0
    pairs.start_worker("decode", int(victim[-1]))
    pairs.wait_until_ready()
    assert_well(pairs)


def test_a_second_ctrl_c_hurries_and_leaves_nothing_behind_either() -> None:
    command = [sys.executable, "-c", "from cli.main import main; main('serve')", "--listen=127.0.0.1:0", "--threads=1"]
    with subprocess.Popen([*command, "--num-blocks=256"], stderr=subprocess.PIPE, text=True) as serve:
        assert serve.stderr is not None
        address = next(line for line in serve.stderr if "ready at" in line).partition("ready at ")[2].split()[0]
        parts = Path(f"/proc/{serve.pid}/task/{serve.pid}/children").read_text().split()
        pools = _pools(map(int, parts))
        with Client(address) as client:
            stream = client.stream(SHORT, max_tokens=2_000, ignore_eos=True)
            assert any(piece.token_ids for piece in stream)
            serve.send_signal(signal.SIGINT)  # the request goes on
            time.sleep(1)
            assert serve.poll() is None
            serve.send_signal(signal.SIGINT)
            threading.Thread(target=serve.stderr.read, daemon=True).start()
            assert serve.wait(timeout=30) == 0
    assert not any(pool.exists() for pool in pools)


def test_nothing_is_left_behind(pair: Cluster) -> None:
    """The last one of this cluster's, which it ends."""
    pair.client.generate(SHORT, max_tokens=2)
    pools = _pools(process.pid for process in pair.processes.values())
    for name in ("router-0", "prefill-0", "decode-0"):
        pair.signal(name, signal.SIGTERM)
    for process in pair.processes.values():
        assert process.wait(timeout=60) == 0
    assert not any(pool.exists() for pool in pools)
    with pytest.raises(Unavailable), Client(pair.target) as client:
        client.model(timeout=2)


def _pools(pids: Iterable[int]) -> set[Path]:
    """Of a prefill and a decode worker among these processes; there may be other clusters on this machine."""
    pools = {SHARED / name for pid in pids for name in mapped_segments(pid)}
    assert len(pools) == 2
    assert all(pool.exists() for pool in pools)
    return pools
