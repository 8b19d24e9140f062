"""Tells routers which blocks a worker need not compute, so that they can send requests to where their prefix is."""

from collections.abc import Iterable, Mapping
from itertools import chain

from common.kv import cache_changes
from common.kv.block_pool import BlockPool
from common.worker.worker_service import WorkerService
from twostroke.v1 import worker_pb2 as pb


class CacheReport:
    """Tells a new router everything that can be found in one of the `pools`, and the others what has changed."""

    def __init__(self, service: WorkerService, *pools: BlockPool) -> None:
        self._service = service
        self._pools = pools
        self._connections: tuple[int, ...] = ()

    def send(self) -> None:
        """Puts what changed since the last call into each router's outgoing message."""
        known, self._connections = self._connections, self._service.connections
        changes = self._take_changes()
        packed = cache_changes.pack(changes) if changes else None
        for connection in self._connections:
            if changes is None or connection not in known:
                self._service.outgoing(connection).cache.CopyFrom(
                    pb.CacheChanges(snapshot=True, published=b"".join(self._hashes()))
                )
            elif packed is not None:
                self._service.outgoing(connection).cache.CopyFrom(packed)

    def _take_changes(self) -> Mapping[bytes, bool] | None:
        taken = [pool.take_changes() for pool in self._pools]
        changes = [changes for changes in taken if changes is not None]
        if len(changes) < len(taken):
            return None
        if len(changes) == 1:
            return changes[0]
        changed = chain.from_iterable(changes)
        return {block_hash: any(pool.finds(block_hash) for pool in self._pools) for block_hash in changed}

    def _hashes(self) -> Iterable[bytes]:
        """Each once, and always in the same order."""
        return dict.fromkeys(chain.from_iterable(pool.hashes() for pool in self._pools))
