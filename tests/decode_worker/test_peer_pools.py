"""Real pools over shm, opened by the decode worker's side."""

import os
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from prometheus_client import CollectorRegistry, Gauge

from common import transport
from common.kv.kv_pool import KvLayout, allocate, layout_to_proto
from common.transport import PoolMemory, TransportError
from decode_worker import peer_pools
from decode_worker.peer_pools import PeerPools
from twostroke.v1 import worker_pb2 as pb

LAYOUT = KvLayout(num_blocks=8, num_layers=1, block_size=4, num_kv_heads=1, head_dim=8, dtype="float32")
CPU = torch.device("cpu")
CONNECTION = 3


class Owners:
    """Prefill workers, as far as their pools go."""

    def __init__(self) -> None:
        self.memories: dict[str, PoolMemory] = {}

    def start(self, name: str, layout: KvLayout = LAYOUT) -> pb.PoolHandle:
        instance = f"test-{os.getpid()}-{name}"
        memory = self.memories[instance] = transport.create("shm", layout, CPU, instance)
        return pb.PoolHandle(
            instance=instance, transport="shm", descriptor=memory.descriptor, layout=layout_to_proto(layout)
        )

    def stop(self, handle: pb.PoolHandle) -> None:
        self.memories.pop(handle.instance).close()


@pytest.fixture
def owners() -> Iterator[Owners]:
    owners = Owners()
    yield owners
    for memory in owners.memories.values():
        memory.close()


class Peers:
    def __init__(self) -> None:
        self.woken = threading.Event()
        self.speeds = Gauge("speed", "", ("instance",), registry=CollectorRegistry())
        self.pools = PeerPools(LAYOUT, CPU, self.speeds, self.woken.set)

    def answer(self) -> tuple[int, pb.PoolOpened]:
        assert self.woken.wait(10)
        (answer,) = self.pools.answers()
        self.woken.clear()
        return answer

    def shown(self) -> dict[str, float]:
        return {
            sample.labels["instance"]: sample.value for metric in self.speeds.collect() for sample in metric.samples
        }


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peers]:
    monkeypatch.setattr(peer_pools, "CHECK_SECONDS", 0.0)
    peers = Peers()
    yield peers
    peers.pools.close()


def test_a_pool_is_proven_once_and_its_speed_is_shown(owners: Owners, peers: Peers) -> None:
    handle = owners.start("one")
    for _ in range(2):
        peers.pools.prove(CONNECTION, handle)
        connection, opened = peers.answer()
        assert (connection, opened.instance, opened.problem) == (CONNECTION, handle.instance, "")
    assert peers.pools.open(handle) is peers.pools.open(handle)
    assert peers.shown()[handle.instance] > 0
    assert not peers.pools.answers()


def test_what_is_asked_again_before_the_answer_is_answered_once_and_briefly(peers: Peers) -> None:
    handle = pb.PoolHandle(instance="a", transport="long" * 10_000, descriptor=b"{}")
    for _ in range(20_000):
        peers.pools.prove(CONNECTION, handle)
        peers.pools.prove(CONNECTION + 1, handle)
    peers.pools.open(handle).exception(timeout=10)
    answers = peers.pools.answers()
    assert [connection for connection, _ in answers] == [CONNECTION, CONNECTION + 1]
    for _, opened in answers:
        assert opened.instance == handle.instance
        assert opened.problem.startswith("no transport is called")
        assert len(opened.problem) == peer_pools.MAX_PROBLEM


def test_why_a_pool_cannot_be_read_is_said_and_it_is_tried_again(owners: Owners, peers: Peers) -> None:
    handle = owners.start("two", replace(LAYOUT, head_dim=16))
    peers.pools.prove(CONNECTION, handle)
    assert "head_dim" in peers.answer()[1].problem
    owners.stop(handle)
    handle = owners.start("two")
    peers.pools.close_gone(in_use=tuple)
    peers.pools.prove(CONNECTION, handle)
    assert peers.answer()[1].problem == ""


@pytest.mark.parametrize("descriptor", [b"", b"{}", b"\xff", b'{"segment": "twostroke-nobody", "nonce": "0"}'])
def test_what_is_no_pool_has_a_reason_too(peers: Peers, descriptor: bytes) -> None:
    handle = pb.PoolHandle(instance="garbage", transport="shm", descriptor=descriptor)
    peers.pools.prove(CONNECTION, handle)
    assert peers.answer()[1].problem


def test_a_reason_that_quotes_half_a_character_is_said_all_the_same(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor is JSON, which may have such in what is quoted of it."""

    def refuse(*_: object) -> None:
        raise TransportError("blocks of worker \ud800 are laid out differently")

    monkeypatch.setattr(peer_pools, "open_peer", refuse)
    peers.pools.prove(CONNECTION, pb.PoolHandle(instance="half"))
    assert peers.answer()[1].problem == "blocks of worker ? are laid out differently"


def test_the_pool_of_a_worker_that_is_gone_is_closed_unless_it_is_still_read(owners: Owners, peers: Peers) -> None:
    handle = owners.start("three")
    peers.pools.prove(CONNECTION, handle)
    peers.answer()
    peer = peers.pools.open(handle).result()
    peers.pools.close_gone(in_use=tuple)
    assert peer.owner_alive()
    owners.stop(handle)
    peers.pools.close_gone(in_use=lambda: {handle.instance})
    assert peers.pools.open(handle).result() is peer
    peers.pools.close_gone(in_use=tuple)
    assert not peers.shown()
    assert peers.pools.open(handle).exception(10) is not None


def test_no_more_pools_are_opened_than_a_host_has_workers(
    owners: Owners, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_pools, "MAX_POOLS", 2)
    handles = [owners.start(f"many-{number}") for number in range(3)]
    problems = []
    for handle in handles:
        peers.pools.prove(CONNECTION, handle)
        problems.append(peers.answer()[1].problem)
    assert problems == ["", "", "the pools of 2 prefill workers are open here already"]
    owners.stop(handles[0])
    peers.pools.close_gone(in_use=tuple)
    peers.pools.prove(CONNECTION, handles[2])
    assert peers.answer()[1].problem == ""


def test_a_pool_that_cannot_be_closed_keeps_no_other_open(owners: Owners, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = Peers()
    first, second = (peers.pools.open(owners.start(name)).result(10) for name in ("first", "second"))
    close = first.close

    def fail() -> None:
        close()
        raise RuntimeError("the GPU has failed")

    monkeypatch.setattr(first, "close", fail)
    peers.pools.close()
    with pytest.raises(TransportError, match="was closed"):
        second.read([0], allocate(LAYOUT, CPU), [0])
