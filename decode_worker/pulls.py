"""KV on its way from prefill workers' pools into this worker's."""

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import structlog
import torch

from common.kv_pool import KvPool
from common.transport import PeerPool, Transfer, TransportError, open_peer
from decode_worker.scheduler import Sequence
from twostroke.v1 import worker_pb2 as pb

log = structlog.get_logger(__name__)

# How often pools of workers that may be gone are looked after.
PEER_CHECK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Pull:
    """What one sequence lacks, and where it lies."""

    sequence: Sequence
    source: pb.KvLocation
    requested: float  # time.monotonic()


@dataclass(frozen=True, slots=True)
class Pulled:
    """A pull that is over. `problem` is empty where the KV is in place; `lease_lost` tells stale blocks from faults."""

    sequence: Sequence
    milliseconds: float
    problem: str = ""
    lease_lost: bool = False


class Puller:
    """Opens each prefill worker's pool once per instance and reads blocks from it, all of a turn in one transfer.

    A sequence in here counts as having a step in flight: its blocks are being written.
    """

    def __init__(self, pool: KvPool, device: torch.device) -> None:
        self._pool = pool
        self._device = device
        self._opener = ThreadPoolExecutor(max_workers=1, thread_name_prefix="open-peer")
        self._peers: dict[str, Future[PeerPool]] = {}
        self._waiting: list[Pull] = []  # until their peer's pool is open
        self._under_way: list[tuple[PeerPool, Transfer, list[Pull]]] = []
        self._next_check = 0.0  # time.monotonic()

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._under_way)

    def start(self, pulls: Iterable[Pull]) -> None:
        for pull in pulls:
            pull.sequence.steps_in_flight += 1
            handle = pull.source.pool
            if handle.instance not in self._peers:
                self._peers[handle.instance] = self._opener.submit(self._open, handle)
            self._waiting.append(pull)

    def poll(self) -> list[Pulled]:
        """What has arrived, or failed, since the last call; starts what could not start before."""
        over = self._read_waiting()
        still_under_way = []
        for peer, transfer, pulls in self._under_way:
            try:
                done = transfer.done()
            except TransportError as error:
                over += [_pulled(pull, problem=str(error)) for pull in pulls]
                continue
            if done:
                over += [_checked(peer, pull) for pull in pulls]
            else:
                still_under_way.append((peer, transfer, pulls))
        self._under_way = still_under_way
        for pulled in over:
            pulled.sequence.steps_in_flight -= 1
        if (now := time.monotonic()) >= self._next_check:
            self._next_check = now + PEER_CHECK_SECONDS
            self._close_gone_peers()
        return over

    def close(self) -> None:
        self._opener.shutdown(cancel_futures=True)
        for opening in self._peers.values():
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                opening.result().close()

    def _close_gone_peers(self) -> None:
        """Closes the pools of workers that are no more, so that their memory can be freed, and forgets those that could
        not be opened, so that the next pull tries again."""
        in_use = {pull.source.pool.instance for pull in self._waiting}
        in_use.update(pull.source.pool.instance for _, _, pulls in self._under_way for pull in pulls)
        for instance, opening in list(self._peers.items()):
            if instance in in_use or not opening.done():
                continue
            if opening.exception() is not None:
                del self._peers[instance]
            elif not (peer := opening.result()).owner_alive():
                peer.close()
                del self._peers[instance]
                log.info("closed the pool of a worker that is gone", instance=instance)

    def _open(self, handle: pb.PoolHandle) -> PeerPool:
        return open_peer(handle.descriptor, handle.transport, self._pool.layout, self._device)

    def _read_waiting(self) -> list[Pulled]:
        over: list[Pulled] = []
        ready: dict[str, list[Pull]] = {}
        waiting = []
        for pull in self._waiting:
            instance = pull.source.pool.instance
            opening = self._peers[instance]
            if not opening.done():
                waiting.append(pull)
            elif (error := opening.exception()) is not None:
                over.append(_pulled(pull, problem=f"cannot open the pool of prefill worker {instance}: {error}"))
            else:
                ready.setdefault(instance, []).append(pull)
        self._waiting = waiting
        for instance, pulls in ready.items():
            peer = self._peers[instance].result()
            source: list[int] = []
            target: list[int] = []
            for pull in pulls:
                cached = pull.sequence.cached_blocks
                source += pull.source.block_ids[cached:]
                target += pull.sequence.blocks[cached : len(pull.source.block_ids)]
            try:
                self._under_way.append((peer, peer.read(source, self._pool, target), pulls))
            except TransportError as error:
                over += [_pulled(pull, problem=str(error)) for pull in pulls]
        return over


def _pulled(pull: Pull, problem: str = "", lease_lost: bool = False) -> Pulled:
    return Pulled(pull.sequence, (time.monotonic() - pull.requested) * 1000, problem, lease_lost)


def _checked(peer: PeerPool, pull: Pull) -> Pulled:
    """The generations are looked at after the copy: had a block been reused meanwhile, its generation would be new."""
    cached = pull.sequence.cached_blocks
    if peer.generations_hold(pull.source.block_ids[cached:], pull.source.generations[cached:]):
        return _pulled(pull)
    return _pulled(pull, problem="the prefill worker's blocks changed while they were read", lease_lost=True)
