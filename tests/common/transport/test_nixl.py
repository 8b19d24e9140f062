import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from common import transport
from common.kv.kv_pool import KvLayout, KvPool, allocate
from common.transport import TransferFailed, TransportError
from tests.common.transport.cpu_owner import CPU, LAYOUT, CpuOwner, assert_blocks_arrive_and_nothing_else, filled
from tests.e2e.hosts import Host, why_not
from tests.pool_owner import PoolOwner

nixl = pytest.importorskip("common.transport.nixl", reason="NIXL is not installed", exc_type=ImportError)

REASON = why_not()


@pytest.fixture(scope="module", autouse=True)
def over_tcp() -> Iterator[None]:
    """As between hosts. UCX would find shared memory on one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", "tcp")
        yield


def start_owner(layout: KvLayout = LAYOUT, host: Host | None = None) -> PoolOwner:
    return CpuOwner("nixl", f"test-{os.getpid()}", layout, host)


@pytest.fixture
def owner() -> Iterator[PoolOwner]:
    owner = start_owner()
    yield owner
    owner.kill()


@pytest.fixture(scope="module")
def lasting_owner() -> Iterator[PoolOwner]:
    owner = start_owner()
    yield owner
    owner.kill()


def open_at_last(owner: PoolOwner, layout: KvLayout) -> transport.PeerPool:
    """As a router has it tried again and again."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return transport.open_peer(owner.descriptor, "nixl", layout, CPU)
        except TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def until_gone(peer: transport.PeerPool) -> None:
    deadline = time.monotonic() + 20
    while peer.owner_alive():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_blocks_arrive_from_another_process_and_nowhere_else(lasting_owner: PoolOwner) -> None:
    ours = replace(LAYOUT, num_blocks=40)
    peer = transport.open_peer(lasting_owner.descriptor, "nixl", ours, CPU)
    assert_blocks_arrive_and_nothing_else(peer, ours)
    assert peer.bytes_per_second > 0
    assert peer.owner_alive()
    peer.close()


def test_a_pool_can_be_opened_again_after_it_was_closed(lasting_owner: PoolOwner) -> None:
    for _ in range(3):
        pool = allocate(LAYOUT, CPU)
        peer = transport.open_peer(lasting_owner.descriptor, "nixl", LAYOUT, CPU)
        peer.read(range(24), pool, range(24)).wait()
        assert torch.equal(pool.tensor, filled())
        peer.close()
        peer.close()
        with pytest.raises(TransferFailed, match="was closed"):
            peer.read([0], pool, [0])


def test_a_reader_sees_that_a_block_was_reused(owner: PoolOwner) -> None:
    pool = allocate(LAYOUT, CPU)
    peer = transport.open_peer(owner.descriptor, "nixl", LAYOUT, CPU)
    blocks = [4, 5, 6]
    peer.read(blocks, pool, blocks).wait()
    assert peer.generations_hold(blocks, [1, 1, 1])
    assert not peer.generations_hold(blocks, [1, 0, 1])
    assert not peer.generations_hold(blocks, [1, 1])
    assert peer.generations_hold([], [])
    assert owner.ask("reuse") == "5"
    peer.read(blocks, pool, blocks).wait()
    assert not peer.generations_hold(blocks, [1, 1, 1])
    assert peer.generations_hold(blocks, [1, 2, 1])
    assert not pool.tensor[5].any()
    peer.close()


def test_an_owner_that_was_killed_is_seen_to_be_gone(owner: PoolOwner) -> None:
    pool = allocate(LAYOUT, CPU)
    peer = transport.open_peer(owner.descriptor, "nixl", LAYOUT, CPU)
    owner.kill()
    with pytest.raises(TransferFailed, match="through NIXL failed"):
        peer.read([1], pool, [2]).wait()
    until_gone(peer)
    peer.close()
    with pytest.raises(TransportError, match=r"is gone.* UCX finds no way there"):
        transport.open_peer(owner.descriptor, "nixl", LAYOUT, CPU)


def test_an_idle_reader_sees_that_its_owner_was_killed(owner: PoolOwner) -> None:
    peer = transport.open_peer(owner.descriptor, "nixl", LAYOUT, CPU)
    assert peer.owner_alive()
    owner.kill()
    until_gone(peer)
    peer.close()


def test_an_owner_that_closes_is_seen_to_be_gone(owner: PoolOwner) -> None:
    peer = transport.open_peer(owner.descriptor, "nixl", LAYOUT, CPU)
    assert owner.ask("close") == "closed"
    until_gone(peer)
    peer.close()
    with pytest.raises(TransportError, match="closed its pool"):
        transport.open_peer(owner.descriptor, "nixl", LAYOUT, CPU)


def test_a_later_worker_of_the_same_name_is_not_mistaken(owner: PoolOwner) -> None:
    owner.kill()
    later = start_owner()
    try:
        with pytest.raises(TransportError, match="is gone"):
            transport.open_peer(owner.descriptor, "nixl", LAYOUT, CPU)
        transport.open_peer(later.descriptor, "nixl", LAYOUT, CPU).close()
    finally:
        later.kill()


LARGE = replace(LAYOUT, num_blocks=256, head_dim=2048)  # 50 MiB: more than sockets hold


@pytest.fixture
def large_owner() -> Iterator[PoolOwner]:
    owner = start_owner(LARGE)
    yield owner
    owner.kill()


def read_while_it_stands_still(owner: PoolOwner) -> tuple[transport.PeerPool, KvPool, transport.Transfer]:
    """A read of all its blocks, which it is stopped before."""
    pool = allocate(LARGE, CPU)
    peer = transport.open_peer(owner.descriptor, "nixl", LARGE, CPU)
    owner.process.send_signal(signal.SIGSTOP)
    return peer, pool, peer.read(range(256), pool, range(256))


def test_a_read_from_an_owner_that_stands_still_goes_on_with_it(large_owner: PoolOwner) -> None:
    """And is not done before: what comes late would be written over another sequence's blocks."""
    peer, pool, transfer = read_while_it_stands_still(large_owner)
    time.sleep(0.5)
    assert not transfer.done()
    large_owner.process.send_signal(signal.SIGCONT)
    transfer.wait()
    assert all(pool.tensor.flatten(1).any(dim=1))
    assert peer.owner_alive()
    peer.close()


def test_a_read_ends_when_an_owner_that_stands_still_is_killed(large_owner: PoolOwner) -> None:
    peer, pool, transfer = read_while_it_stands_still(large_owner)
    time.sleep(0.2)
    large_owner.kill()
    with pytest.raises(TransferFailed, match="through NIXL failed"):
        transfer.wait()
    pool.tensor.fill_(3)
    time.sleep(0.5)
    assert (pool.tensor == 3).all()
    until_gone(peer)
    peer.close()


@pytest.mark.slow
@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_a_read_from_a_host_that_is_cut_off_ends_and_nothing_arrives_later() -> None:
    with Host() as host:
        owner = start_owner(LARGE, host)
        try:
            pool = allocate(LARGE, CPU)
            peer = transport.open_peer(owner.descriptor, "nixl", LARGE, CPU)
            host.outward.delay_seconds = 0.3
            transfer = peer.read(range(256), pool, range(256))
            time.sleep(0.5)
            host.cut()
            began = time.monotonic()
            with pytest.raises(TransferFailed, match="through NIXL failed"):
                transfer.wait()
            assert time.monotonic() - began < 30
            pool.tensor.fill_(3)  # another sequence's
            host.heal()
            time.sleep(3)
            assert (pool.tensor == 3).all()
            assert not peer.owner_alive()
            peer.close()
            again = open_at_last(owner, LARGE)
            again.read(range(256), pool, range(256)).wait()
            assert not (pool.tensor == 3).flatten(1).all(dim=1).any()
            again.close()
        finally:
            owner.kill()


def test_a_read_under_way_does_not_hold_up_closing(large_owner: PoolOwner) -> None:
    peer, _, transfer = read_while_it_stands_still(large_owner)
    began = time.monotonic()
    peer.close()
    assert time.monotonic() - began < 5
    with pytest.raises(TransferFailed, match=r"NotYet|CancelledError"):
        transfer.wait()


def test_opening_the_pool_of_an_owner_that_stands_still_ends(owner: PoolOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "OPEN_SECONDS", 0.5)
    owner.process.send_signal(signal.SIGSTOP)
    with pytest.raises(TransportError, match="UCX finds no way there"):
        transport.open_peer(owner.descriptor, "nixl", LAYOUT, CPU)
    owner.process.send_signal(signal.SIGCONT)
    monkeypatch.undo()
    transport.open_peer(owner.descriptor, "nixl", LAYOUT, CPU).close()


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (replace(LAYOUT, dtype="float16"), "dtype is bfloat16 there and float16 here"),
        (replace(LAYOUT, block_size=16), "block_size is 4 there and 16 here"),
    ],
)
def test_another_layout_is_refused_with_both_values(lasting_owner: PoolOwner, ours: KvLayout, said: str) -> None:
    with pytest.raises(TransportError, match=said):
        transport.open_peer(lasting_owner.descriptor, "nixl", ours, CPU)


def test_a_probe_that_arrives_changed_is_refused(owner: PoolOwner) -> None:
    assert owner.ask("spoil") == "spoilt"
    with pytest.raises(TransportError, match="was not read intact"):
        transport.open_peer(owner.descriptor, "nixl", LAYOUT, CPU)


def test_blocks_outside_a_pool_are_refused(lasting_owner: PoolOwner) -> None:
    peer = transport.open_peer(lasting_owner.descriptor, "nixl", LAYOUT, CPU)
    small = allocate(replace(LAYOUT, num_blocks=2), CPU)
    for source, target in ([24], [0]), ([-1], [0]), ([0], [2]), ([0, 1], [1]):
        with pytest.raises(TransferFailed, match=r"not all among|cannot be read into"):
            peer.read(source, small, target)
    empty = peer.read([], small, [])
    empty.wait()
    assert empty.done()
    peer.close()


@pytest.mark.parametrize(
    "change",
    [
        {"agent": "not base64"},
        {"agent": ""},
        {"agent": "bm9uc2Vuc2U="},
        {"pool": 4096},  # memory that the owner did not register
        {"control": 4096},
        {"layout": {}},
        {"nonce": 1},
        {"other": 1},
    ],
)
def test_descriptors_that_are_wrong(lasting_owner: PoolOwner, change: dict[str, object]) -> None:
    descriptor = json.dumps(json.loads(lasting_owner.descriptor) | change).encode()
    with pytest.raises(TransportError, match=r"malformed|cannot be read|closed its pool"):
        transport.open_peer(descriptor, "nixl", LAYOUT, CPU)
    transport.open_peer(lasting_owner.descriptor, "nixl", LAYOUT, CPU).close()  # nothing of that did harm


@pytest.mark.parametrize("descriptor", [b"", b"[]", b"{}", b'{"segment": "twostroke-x", "nonce": ""}'])
def test_descriptors_of_other_transports(descriptor: bytes) -> None:
    with pytest.raises(TransportError, match="malformed"):
        transport.open_peer(descriptor, "nixl", LAYOUT, CPU)


def test_a_way_that_ucx_does_not_have_is_named() -> None:
    program = (
        "import torch; from common import transport; from common.kv.kv_pool import KvLayout\n"
        "transport.create('nixl', KvLayout(2, 1, 4, 2, 8, 'bfloat16'), torch.device('cpu'), 'x')"
    )
    env = os.environ | {"PYTHONPATH": ":".join(sys.path), "UCX_TLS": "rc"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode
    assert "NIXL cannot start UCX" in done.stderr
    assert "UCX_TLS is rc" in done.stderr


def test_an_idle_agent_leaves_the_cpu_alone(lasting_owner: PoolOwner) -> None:
    peer = transport.open_peer(lasting_owner.descriptor, "nixl", LAYOUT, CPU)
    began = time.process_time()
    time.sleep(1)
    assert time.process_time() - began < 0.3
    peer.close()
