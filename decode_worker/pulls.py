"""KV on its way from prefill workers' pools into this worker's pool."""

import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from common.kv.kv_pool import KvPool
from common.transport import PeerPool, Transfer, TransportError
from decode_worker.peer_pools import PeerPools, problem_of
from decode_worker.scheduler import Sequence
from twostroke.v1 import worker_pb2 as pb


@dataclass(frozen=True, slots=True)
class Pull:
    """A sequence that lacks KV, and where that KV is."""

    sequence: Sequence
    source: pb.KvLocation
    requested: float  # time.monotonic()


@dataclass(frozen=True, slots=True)
class Pulled:
    """A pull that is over. `problem` is empty if the KV is in place; `lease_lost`: the blocks were stale."""

    sequence: Sequence
    milliseconds: float
    problem: str = ""
    lease_lost: bool = False


class Puller:
    """Reads blocks from prefill workers' pools, in one transfer for each turn and worker.

    A pull counts as a step in flight of its sequence, because it writes to the sequence's blocks.
    """

    def __init__(self, pool: KvPool, peers: PeerPools) -> None:
        self._pool = pool
        self._peers = peers
        self._waiting: list[tuple[Future[PeerPool], Pull]] = []  # until their peer's pool is open
        self._under_way: list[tuple[PeerPool, Transfer, list[Pull]]] = []

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._under_way)

    def start(self, pulls: Iterable[Pull]) -> None:
        for pull in pulls:
            pull.sequence.writes_in_flight += 1
            self._waiting.append((self._peers.open(pull.source.pool), pull))

    def poll(self) -> list[Pulled]:
        """Returns the pulls that ended since the last call, and starts those whose pools have been opened."""
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
            pulled.sequence.writes_in_flight -= 1
        self._peers.close_gone(in_use=self._sources)
        return over

    def _sources(self) -> set[str]:
        """Instances of the workers with pulls waiting or under way."""
        pulls = [pull for _, pull in self._waiting]
        pulls += [pull for _, _, together in self._under_way for pull in together]
        return {pull.source.pool.instance for pull in pulls}

    def _read_waiting(self) -> list[Pulled]:
        over: list[Pulled] = []
        ready: dict[PeerPool, list[Pull]] = {}
        waiting = []
        for opening, pull in self._waiting:
            if not opening.done():
                waiting.append((opening, pull))
            elif problem := problem_of(opening):
                instance = pull.source.pool.instance
                over.append(_pulled(pull, problem=f"cannot open the pool of prefill worker {instance}: {problem}"))
            else:
                ready.setdefault(opening.result(), []).append(pull)
        self._waiting = waiting
        for peer, pulls in ready.items():
            over += self._read(peer, pulls)
        return over

    def _read(self, peer: PeerPool, pulls: list[Pull]) -> list[Pulled]:
        """Begins a transfer. Returns those of the pulls that cannot be part of it."""
        source: list[int] = []
        target: list[int] = []
        for pull in pulls:
            cached = pull.sequence.cached_blocks
            source += pull.source.block_ids[cached:]
            target += pull.sequence.blocks[cached : len(pull.source.block_ids)]
        try:
            self._under_way.append((peer, peer.read(source, self._pool, target), pulls))
        except TransportError as error:
            if len(pulls) == 1:
                return [_pulled(pulls[0], problem=str(error))]
            return [over for pull in pulls for over in self._read(peer, [pull])]  # the fault of one need not be all's
        return []


def _pulled(pull: Pull, problem: str = "", lease_lost: bool = False) -> Pulled:
    return Pulled(pull.sequence, (time.monotonic() - pull.requested) * 1000, problem, lease_lost)


def _checked(peer: PeerPool, pull: Pull) -> Pulled:
    """Compares generations, after the copy: a block that was reused meanwhile has a new one."""
    cached = pull.sequence.cached_blocks
    if peer.generations_hold(pull.source.block_ids[cached:], pull.source.generations[cached:]):
        return _pulled(pull)
    return _pulled(pull, problem="the prefill worker's blocks changed while they were read", lease_lost=True)
