"""Tells routers which blocks a worker's pool can find, so that they can send requests to where their prefix is."""

from common.kv import cache_changes
from common.kv.block_pool import BlockPool
from common.worker.worker_service import WorkerService
from twostroke.v1 import worker_pb2 as pb


class CacheReport:
    """Tells a new router everything that can be found, and the others what has changed."""

    def __init__(self, service: WorkerService, blocks: BlockPool) -> None:
        self._service = service
        self._blocks = blocks
        self._connections: tuple[int, ...] = ()

    def send(self) -> None:
        """Puts what changed since the last call into each router's outgoing message."""
        known, self._connections = self._connections, self._service.connections
        changes = self._blocks.take_changes()
        packed = cache_changes.pack(changes) if changes else None
        for connection in self._connections:
            if changes is None or connection not in known:
                self._service.outgoing(connection).cache.CopyFrom(
                    pb.CacheChanges(snapshot=True, published=b"".join(self._blocks.hashes()))
                )
            elif packed is not None:
                self._service.outgoing(connection).cache.CopyFrom(packed)
