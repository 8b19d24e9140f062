import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from common import transport
from common.kv.kv_pool import KvLayout, allocate
from common.transport import TransferFailed, TransportError
from tests.pool_owner import PoolOwner

pytest.importorskip("cupy", reason="cupy is not installed")

LAYOUT = KvLayout(num_blocks=300, num_layers=5, block_size=16, num_kv_heads=3, head_dim=80, dtype="bfloat16")
READER = torch.device("cuda", 0)

FILL = """
assert not pool.any(), "a new pool is not zeroed"
for block in range(300):
    pool[block] = torch.randn(layout.shape[1:], generator=torch.Generator().manual_seed(block)).to(device)
"""


class Owner(PoolOwner):
    def __init__(self, device: int, name: str, num_blocks: int = 300) -> None:
        layout, instance = replace(LAYOUT, num_blocks=num_blocks), f"test-{os.getpid()}-{name}"
        super().__init__("cuda_ipc", torch.device("cuda", device), instance, layout, FILL)


@pytest.fixture(params=["same GPU", "another GPU"])
def owner(request: pytest.FixtureRequest) -> Iterator[Owner]:
    if request.param == "another GPU" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    owner = Owner(0 if request.param == "same GPU" else 1, "owner")
    yield owner
    owner.kill()
    transport.sweep()


def content(block: int) -> torch.Tensor:
    values = torch.randn(LAYOUT.shape[1:], generator=torch.Generator().manual_seed(block))
    return values.to(torch.bfloat16).to(READER)


def test_scrambled_blocks_arrive_and_nothing_else_changes(owner: Owner) -> None:
    ours = replace(LAYOUT, num_blocks=417)
    pool = allocate(ours, READER)
    peer = transport.open_peer(owner.descriptor, "cuda_ipc", ours, READER)
    generator = torch.Generator().manual_seed(1)
    source = torch.randperm(300, generator=generator)[:211].tolist()
    target = torch.randperm(417, generator=generator)[:211].tolist()
    torch.cuda.synchronize()
    transfer = peer.read(source, pool, target)
    deadline = time.monotonic() + 10
    while not transfer.done():
        assert time.monotonic() < deadline
    assert transfer.milliseconds > 0
    expected = torch.zeros_like(pool.tensor)
    for src, dst in zip(source, target, strict=True):
        expected[dst] = content(src)
    assert torch.equal(pool.tensor, expected)
    peer.close()


def test_transfers_in_flight_together_do_not_mix(owner: Owner) -> None:
    pool = allocate(LAYOUT, READER)
    peer = transport.open_peer(owner.descriptor, "cuda_ipc", LAYOUT, READER)
    torch.cuda.synchronize()
    transfers = [peer.read([block], pool, [299 - block]) for block in range(40)]
    transfers.append(peer.read([], pool, []))
    for transfer in transfers:
        transfer.wait()
        assert transfer.done()
    for block in range(40):
        assert torch.equal(pool.tensor[299 - block], content(block))
    peer.close()


def test_a_reader_sees_that_a_block_was_reused(owner: Owner) -> None:
    pool = allocate(LAYOUT, READER)
    peer = transport.open_peer(owner.descriptor, "cuda_ipc", LAYOUT, READER)
    blocks = [4, 5, 6]
    assert peer.generations_hold(blocks, [1, 1, 1])
    assert int(owner.ask("reuse")) == 5
    peer.read(blocks, pool, blocks).wait()
    assert not peer.generations_hold(blocks, [1, 1, 1])
    assert peer.generations_hold(blocks, [1, 2, 1])
    assert not pool.tensor[5].any()
    assert torch.equal(pool.tensor[6], content(6))
    peer.close()


def test_an_owner_that_closes_is_seen_to_be_gone(owner: Owner) -> None:
    peer = transport.open_peer(owner.descriptor, "cuda_ipc", LAYOUT, READER)
    assert peer.owner_alive()
    assert owner.ask("close") == "closed"
    assert not peer.owner_alive()
    peer.close()
    peer.close()
    with pytest.raises(TransferFailed, match="was closed"):
        peer.read([0], allocate(LAYOUT, READER), [0])
    with pytest.raises(TransportError, match="is not here"):
        transport.open_peer(owner.descriptor, "cuda_ipc", LAYOUT, READER)


def test_a_killed_owners_memory_is_freed_by_closing_and_its_successor_is_opened() -> None:
    big = replace(LAYOUT, num_blocks=(24 << 30) // LAYOUT.block_bytes)  # far more than tests beside this one may take
    pool = allocate(LAYOUT, READER)
    free_before, _ = torch.cuda.mem_get_info(READER)
    first = Owner(0, "first", big.num_blocks)
    peer = transport.open_peer(first.descriptor, "cuda_ipc", LAYOUT, READER)
    first.kill()
    assert not peer.owner_alive()
    peer.close()
    deadline = time.monotonic() + 10
    while torch.cuda.mem_get_info(READER)[0] < free_before - (12 << 30):
        assert time.monotonic() < deadline, "the dead owner's pool is still held"
        time.sleep(0.05)
    second = Owner(0, "second")
    try:
        peer = transport.open_peer(second.descriptor, "cuda_ipc", LAYOUT, READER)
        peer.read([9], pool, [3]).wait()
        assert torch.equal(pool.tensor[3], content(9))
        peer.close()
    finally:
        second.kill()
        transport.sweep()


def test_what_cannot_be_opened_is_refused_with_a_reason(owner: Owner) -> None:
    with pytest.raises(TransportError, match="dtype is bfloat16 there and float16 here"):
        transport.open_peer(owner.descriptor, "cuda_ipc", replace(LAYOUT, dtype="float16"), READER)
    fields = json.loads(owner.descriptor)
    for change, said in [
        ({"handle": "00" * 64}, "cannot be mapped"),
        ({"handle": "00" * 64, "gpu": "GPU-elsewhere"}, "CUDA_VISIBLE_DEVICES"),
        ({"handle": "no handle"}, "has no GPU memory to map"),
    ]:
        with pytest.raises(TransportError, match=said):
            transport.open_peer(json.dumps(fields | change).encode(), "cuda_ipc", LAYOUT, READER)
    peer = transport.open_peer(owner.descriptor, "cuda_ipc", LAYOUT, READER)  # nothing of that did harm
    peer.close()


def test_pools_that_do_not_fit_are_refused_and_leave_nothing() -> None:
    huge = replace(LAYOUT, num_blocks=(1 << 42) // LAYOUT.block_bytes)
    with pytest.raises(TransportError, match="--num-blocks"):
        transport.create("cuda_ipc", huge, READER, f"test-{os.getpid()}-huge")
    with pytest.raises(TransportError, match="raise --block-size"):
        transport.create("cuda_ipc", KvLayout(8, 1, 1, 1, 2, "float16"), READER, f"test-{os.getpid()}-odd")
    assert not list(transport.segment.DIRECTORY.glob(f"twostroke-test-{os.getpid()}-*"))


@pytest.mark.parametrize("block_bytes", [16, 48, 16 * 1023, 16 * 1025, 1 << 16, 153_600])
@pytest.mark.parametrize(("pairs", "ctas"), [(1, 16), (9, 1), (190, 3), (190, 16)])
def test_the_kernel_copies_every_byte_of_any_shape(block_bytes: int, pairs: int, ctas: int) -> None:
    from common.transport.block_copy import BlockCopier

    generator = torch.Generator(READER).manual_seed(block_bytes + pairs)
    source = torch.randint(0, 255, (200, block_bytes), dtype=torch.uint8, device=READER, generator=generator)
    target = torch.zeros_like(source)
    expected = torch.zeros_like(source)
    src = torch.randperm(200, generator=torch.Generator().manual_seed(2))[:pairs].tolist()
    dst = torch.randperm(200, generator=torch.Generator().manual_seed(3))[:pairs].tolist()
    expected[dst] = source[src]
    torch.cuda.synchronize()
    BlockCopier(0, 200, ctas).start(source.data_ptr(), src, target.data_ptr(), dst, block_bytes).wait()
    assert torch.equal(target, expected)
