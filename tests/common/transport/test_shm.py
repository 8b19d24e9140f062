import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import transport
from common.kv.kv_pool import KvLayout, KvPool, allocate, view
from common.transport import TransferFailed, TransportError, segment, shm
from common.transport.thread_transfer import ThreadTransfer
from tests.common.transport.cpu_owner import CPU, LAYOUT, CpuOwner, assert_blocks_arrive_and_nothing_else, filled


class Owner(CpuOwner):
    def __init__(self, instance: str) -> None:
        self.path = segment.DIRECTORY / (segment.PREFIX + instance)
        super().__init__("shm", instance)


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = Owner(f"test-{os.getpid()}")
    yield owner
    owner.kill()
    transport.sweep()
    assert not owner.path.exists()


@pytest.fixture(scope="module")
def lasting_owner() -> Iterator[Owner]:
    owner = Owner(f"test-{os.getpid()}-lasting")
    yield owner
    owner.kill()
    transport.sweep()


def mapped(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_blocks_arrive_in_another_process_and_nowhere_else(lasting_owner: Owner) -> None:
    ours = replace(LAYOUT, num_blocks=40)
    peer = transport.open_peer(lasting_owner.descriptor, "shm", ours, CPU)
    assert_blocks_arrive_and_nothing_else(peer, ours)
    peer.close()


def test_a_reader_sees_that_a_block_was_reused(owner: Owner) -> None:
    pool = allocate(LAYOUT, CPU)
    peer = transport.open_peer(owner.descriptor, "shm", LAYOUT, CPU)
    blocks = [4, 5, 6]
    assert peer.generations_hold(blocks, [1, 1, 1])
    assert not peer.generations_hold(blocks, [1, 0, 1])
    assert not peer.generations_hold(blocks, [1, 1])
    reused = int(owner.ask("reuse"))
    assert reused == 5
    peer.read(blocks, pool, blocks).wait()
    assert not peer.generations_hold(blocks, [1, 1, 1])
    assert peer.generations_hold(blocks, [1, 2, 1])
    assert not pool.tensor[5].any()
    peer.close()


def test_sweep_removes_what_the_killed_left_and_nothing_else(owner: Owner, lasting_owner: Owner) -> None:
    peer = transport.open_peer(owner.descriptor, "shm", LAYOUT, CPU)
    transport.sweep()
    assert lasting_owner.path.exists()
    assert owner.path.exists()
    assert peer.owner_alive()
    owner.kill()
    assert not peer.owner_alive()
    # Another worker that starts on this machine may have swept already: then the segment is not here.
    with pytest.raises(TransportError, match=r"worker (that )?is gone"):
        transport.open_peer(owner.descriptor, "shm", LAYOUT, CPU)
    transport.sweep()
    assert not owner.path.exists()
    assert lasting_owner.path.exists()
    with pytest.raises(TransportError, match="is not here"):
        transport.open_peer(owner.descriptor, "shm", LAYOUT, CPU)
    # What is mapped stays readable: a copy under way ends as it would have.
    pool = allocate(LAYOUT, CPU)
    peer.read([1], pool, [2]).wait()
    assert torch.equal(pool.tensor[2], filled()[1])
    assert mapped(owner.path) == 1
    peer.close()
    assert mapped(owner.path) == 0


def test_sweep_leaves_what_only_has_such_a_name() -> None:
    folder, pipe, file, half = (
        segment.DIRECTORY / f"{segment.PREFIX}test-{os.getpid()}-{kind}" for kind in ("folder", "pipe", "file", "half")
    )
    try:
        folder.mkdir()
        os.mkfifo(pipe)
        file.write_text("somebody's")
        half.write_bytes(bytes(segment.HEADER_BYTES))  # left by a worker that was killed before it had written a header
        transport.sweep()
        assert (folder.exists(), pipe.exists(), file.exists(), half.exists()) == (True, True, True, False)
    finally:
        folder.rmdir()
        pipe.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        half.unlink(missing_ok=True)


def test_an_owner_that_closes_is_seen_to_be_gone(owner: Owner) -> None:
    peer = transport.open_peer(owner.descriptor, "shm", LAYOUT, CPU)
    assert owner.ask("close") == "closed"
    assert not peer.owner_alive()
    assert not owner.path.exists()
    peer.close()
    peer.close()
    with pytest.raises(TransferFailed, match="was closed"):
        peer.read([0], allocate(LAYOUT, CPU), [0])


def test_a_later_worker_of_the_same_name_is_not_mistaken(owner: Owner) -> None:
    owner.kill()
    later = Owner(owner.path.name.removeprefix(segment.PREFIX))
    try:
        with pytest.raises(TransportError, match="a later worker of the same name"):
            transport.open_peer(owner.descriptor, "shm", LAYOUT, CPU)
    finally:
        later.kill()


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_one_that_is_gone_is_not_waited_for(owner: Owner) -> None:
    assert owner.ask("close") == "closed"
    os.mkfifo(owner.path)
    try:
        with pytest.raises(TransportError, match="is no segment"):
            transport.open_peer(owner.descriptor, "shm", LAYOUT, CPU)
    finally:
        owner.path.unlink()


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (replace(LAYOUT, dtype="float16"), "dtype is bfloat16 there and float16 here"),
        (replace(LAYOUT, block_size=16), "block_size is 4 there and 16 here"),
        (
            replace(LAYOUT, num_layers=2, head_dim=12),
            "num_layers is 3 there and 2 here, head_dim is 8 there and 12 here",
        ),
    ],
)
def test_another_layout_is_refused_with_both_values(ours: KvLayout, said: str) -> None:
    memory = transport.create("shm", LAYOUT, CPU, f"test-{os.getpid()}")
    try:
        with pytest.raises(TransportError, match=said):
            transport.open_peer(memory.descriptor, "shm", ours, CPU)
    finally:
        memory.close()


@pytest.fixture
def memory() -> Iterator[shm.ShmMemory]:
    memory = shm.create(LAYOUT, CPU, f"test-{os.getpid()}")
    yield memory
    memory.close()


def test_the_pool_is_private_zeroed_and_gone_when_closed(memory: shm.ShmMemory) -> None:
    (path,) = segment.DIRECTORY.glob(f"twostroke-test-{os.getpid()}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    pool = KvPool(LAYOUT, view(memory.tensor, LAYOUT))
    assert not pool.tensor.any()
    assert list(memory.generations) == [0] * LAYOUT.num_blocks
    with pytest.raises(TransportError, match="File exists"):
        shm.create(LAYOUT, CPU, f"test-{os.getpid()}")
    memory.close()
    assert not path.exists()
    pool.tensor.fill_(1)  # memory that is still viewed stays


def test_a_probe_that_arrives_changed_is_refused(memory: shm.ShmMemory) -> None:
    (path,) = segment.DIRECTORY.glob(f"twostroke-test-{os.getpid()}")
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    mappings = mapped(path)
    with pytest.raises(TransportError, match="was not read intact"):
        shm.open_peer(memory.descriptor, LAYOUT, CPU)
    assert mapped(path) == mappings


def test_blocks_outside_a_pool_are_refused(memory: shm.ShmMemory) -> None:
    peer = shm.open_peer(memory.descriptor, LAYOUT, CPU)
    small = allocate(replace(LAYOUT, num_blocks=2), CPU)
    for source, target, said in [
        ([24], [0], "24 to 24 are not all among the 24 of the peer's pool"),
        ([-1], [0], "of the peer's pool"),
        ([0], [2], "not all among the 2 of this worker's pool"),
        ([0, 1], [1], "2 blocks cannot be read into 1"),
    ]:
        with pytest.raises(TransferFailed, match=said):
            peer.read(source, small, target)
    empty = peer.read([], small, [])
    empty.wait()
    assert empty.done()
    peer.close()


def test_a_copy_that_fails_says_so_whenever_it_is_asked() -> None:
    copy: Future[float] = Future()
    transfer = ThreadTransfer(copy, "copying from the peer's shared memory")
    assert not transfer.done()
    copy.set_exception(MemoryError("none left"))
    for ask in (transfer.done, transfer.wait, transfer.done):
        with pytest.raises(TransferFailed, match="none left"):
            ask()


def test_too_little_shared_memory_is_a_sentence_and_leaves_nothing() -> None:
    huge = replace(LAYOUT, num_blocks=2**40 // LAYOUT.block_bytes * 64)
    with pytest.raises(TransportError, match=r"--shm-size.*shm_size.*--num-blocks"):
        transport.create("shm", huge, CPU, f"test-{os.getpid()}-huge")
    assert not list(segment.DIRECTORY.glob(f"twostroke-test-{os.getpid()}-huge"))


@pytest.mark.parametrize(
    "descriptor",
    [
        b"",
        b"[]",
        b"{}",
        json.dumps({"segment": "twostroke-../../etc/passwd", "nonce": ""}).encode(),
        json.dumps({"segment": "other", "nonce": ""}).encode(),
        json.dumps({"segment": 7, "nonce": ""}).encode(),
    ],
)
def test_malformed_descriptors(descriptor: bytes) -> None:
    with pytest.raises(TransportError, match="malformed"):
        transport.open_peer(descriptor, "shm", LAYOUT, CPU)


def test_a_segment_of_another_version(memory: shm.ShmMemory) -> None:
    (path,) = segment.DIRECTORY.glob(f"twostroke-test-{os.getpid()}")
    with path.open("r+b") as file:
        file.write(b"twostroke kv 0\n")
    with pytest.raises(TransportError, match="no segment of this version"):
        transport.open_peer(memory.descriptor, "shm", LAYOUT, CPU)


@pytest.mark.parametrize("instance", ["", "a/b", "..", "x" * 200])
def test_instances_that_cannot_name_a_file(instance: str) -> None:
    with pytest.raises(TransportError, match="cannot name a segment"):
        transport.create("shm", LAYOUT, CPU, instance)


@pytest.mark.parametrize(
    ("name", "device", "use"), [("shm", torch.device("cuda", 0), "cuda_ipc"), ("cuda_ipc", CPU, "shm")]
)
def test_a_transport_for_other_devices_is_refused(name: str, device: torch.device, use: str) -> None:
    said = f"^transport {name} is for .*, and the device is {device}; use --transport {use}$"
    with pytest.raises(TransportError, match=said):
        transport.create(name, LAYOUT, device, f"test-{os.getpid()}")
    with pytest.raises(TransportError, match=said):
        transport.open_peer(b"", name, LAYOUT, device)


def test_transports_that_do_not_work_here() -> None:
    with pytest.raises(TransportError, match='no transport is called "rdma"'):
        transport.create("rdma", LAYOUT, CPU, "test")
    with pytest.raises(TransportError, match="use --transport cuda_ipc"):
        transport.create("shm", LAYOUT, torch.device("cuda:0"), "test")
    with pytest.raises(TransportError, match=r"cuda_ipc"):
        transport.create("cuda_ipc", LAYOUT, CPU, "test")
