"""Tells routers which blocks a worker can find, so that they can send requests to where their prefix is."""

from common.kv import cache_changes
from common.kv.block_pool import BlockPool
from common.worker.worker_service import WorkerService
from twostroke.v1 import worker_pb2 as pb


class CacheReport:
    """Tells a new router everything that can be found, and the others what has changed.

    Args:
        service: where it is sent.
        pools: the worker's, and that in host memory if it has one.
    """

    def __init__(self, service: WorkerService, *pools: BlockPool) -> None:
        self._service = service
        self._pools = pools
        self._connections: tuple[int, ...] = ()

    def send(self) -> None:
        """Puts what changed since the last call into each router's outgoing message."""
        known, self._connections = self._connections, self._service.connections
        for field, pool in zip(cache_changes.FIELDS, self._pools, strict=False):
            changes = pool.take_changes()
            packed = cache_changes.pack(changes) if changes else None
            for connection in self._connections:
                if changes is None or connection not in known:
                    told = pb.CacheChanges(snapshot=True, published=b"".join(pool.hashes()))
                elif packed is not None:
                    told = packed
                else:
                    continue
                getattr(self._service.outgoing(connection), field).CopyFrom(told)
