"""KV that is pulled out of another worker's pool, over shm."""

import os
import time

import torch
from prometheus_client import CollectorRegistry, Gauge

from common import transport
from common.kv.kv_pool import KvLayout, allocate, layout_to_proto, view
from decode_worker.peer_pools import PeerPools
from decode_worker.pulls import Pull, Pulled, Puller
from decode_worker.scheduler import Sequence
from tests.specs import spec
from twostroke.v1 import worker_pb2 as pb

LAYOUT = KvLayout(num_blocks=8, num_layers=1, block_size=4, num_kv_heads=1, head_dim=8, dtype="float32")
CPU = torch.device("cpu")


def test_a_block_that_does_not_exist_fails_only_the_sequence_that_it_was_named_for() -> None:
    instance = f"test-{os.getpid()}-pulled"
    memory = transport.create("shm", LAYOUT, CPU, instance)
    theirs = view(memory.tensor, LAYOUT)
    theirs += torch.arange(LAYOUT.num_blocks).view(-1, 1, 1, 1, 1, 1)
    handle = pb.PoolHandle(
        instance=instance, transport="shm", descriptor=memory.descriptor, layout=layout_to_proto(LAYOUT)
    )
    own = allocate(LAYOUT, CPU)
    peers = PeerPools(LAYOUT, CPU, Gauge("speed", "", ("instance",), registry=CollectorRegistry()), lambda: None)
    puller = Puller(own, peers)

    def pull(number: int, blocks: list[int]) -> Pull:
        sequence = Sequence(number, 0, spec(range(4 * len(blocks)), 4), [], blocks=[2 * number, 2 * number + 1])
        location = pb.KvLocation(pool=handle, block_ids=blocks, generations=[0] * len(blocks))
        return Pull(sequence, location, time.monotonic())

    try:
        peers.open(handle).result(10)  # so that all go in one turn
        puller.start([pull(0, [5, 3]), pull(1, [4, 8]), pull(2, [7, 1])])
        over: list[Pulled] = []
        while puller.busy:
            over += puller.poll()
    finally:
        peers.close()
        memory.close()
    problems = {pulled.sequence.attempt_id: pulled.problem for pulled in over}
    assert problems == {0: "", 1: "blocks 4 to 8 are not all among the 8 of the peer's pool", 2: ""}
    assert own.tensor[:, 0, 0, 0, 0, 0].tolist() == [5, 3, 0, 0, 7, 1, 0, 0]
