"""The pools of prefill workers: each opened and probed once, on another thread, and closed when its owner is gone."""

import time
from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import structlog
import torch
from prometheus_client import Gauge

from common.kv.kv_pool import KvLayout
from common.transport import PeerPool, TransportError, open_peer
from twostroke.v1 import worker_pb2 as pb

log = structlog.get_logger(__name__)

# How often to check for pools whose owners are gone.
CHECK_SECONDS = 1.0
# Most pools open at once. A router only names the prefill workers of this host or, with a transport that crosses
# between hosts, of its cluster.
MAX_POOLS = 64
# Characters of a sentence about a pool that can't be opened. It quotes the handle, which may be of any length.
MAX_PROBLEM = 400


class PeerPools:
    """Opened pools, and those that are being opened, by their owners' instances. For the engine's thread only.

    Args:
        layout: of the pool that is read into.
        device: where that pool lies.
        speeds: gauge of each open pool, by instance: bytes per second at which its first blocks were read.
        wake: called from any thread when `answers` has something new.
    """

    def __init__(self, layout: KvLayout, device: torch.device, speeds: Gauge, wake: Callable[[], None]) -> None:
        self._layout = layout
        self._device = device
        self._speeds = speeds
        self._wake = wake
        self._opener = ThreadPoolExecutor(max_workers=1, thread_name_prefix="open-peer")
        self._pools: dict[str, Future[PeerPool]] = {}
        self._asked: dict[tuple[int, str], Future[PeerPool]] = {}  # by connection and instance
        self._next_check = 0.0  # time.monotonic()

    def open(self, handle: pb.PoolHandle) -> Future[PeerPool]:
        """The worker's pool, opened once however often it is asked for."""
        opening = self._pools.get(handle.instance)
        if opening is None and len(self._pools) >= MAX_POOLS:
            opening = Future()
            opening.set_exception(TransportError(f"the pools of {MAX_POOLS} prefill workers are open here already"))
        elif opening is None:
            opening = self._pools[handle.instance] = self._opener.submit(self._open, handle)
        return opening

    def prove(self, connection: int, handle: pb.PoolHandle) -> None:
        """Opens a pool before there is anything to pull from it; `answers` returns the outcome, once however often it
        was asked for."""
        asked = connection, handle.instance
        if asked in self._asked:
            return
        opening = self._asked[asked] = self.open(handle)
        opening.add_done_callback(lambda _: self._wake())

    def answers(self) -> list[tuple[int, pb.PoolOpened]]:
        """Outcomes of `prove` since the last call, with the connection that asked."""
        over = [asked for asked, opening in self._asked.items() if opening.done()]
        return [
            (connection, pb.PoolOpened(instance=instance, problem=problem_of(self._asked.pop((connection, instance)))))
            for connection, instance in over
        ]

    def close_gone(self, in_use: Callable[[], Container[str]]) -> None:
        """Closes the pools of workers that are gone, so that their memory can be freed, and forgets those that could
        not be opened, so that the next `open` tries again. Call it every turn; it checks once a second."""
        if (now := time.monotonic()) < self._next_check:
            return
        self._next_check = now + CHECK_SECONDS
        kept = in_use()
        for instance, opening in list(self._pools.items()):
            if instance in kept or not opening.done():
                continue
            if opening.exception() is not None:
                del self._pools[instance]
            elif not (peer := opening.result()).owner_alive():
                peer.close()
                self._speeds.remove(instance)
                del self._pools[instance]
                log.info("closed the pool of a worker that is gone", instance=instance)

    def close(self) -> None:
        """Also of an engine that has failed: the process could not end while a thread still waits for a peer."""
        self._opener.shutdown(cancel_futures=True)
        for opening in self._pools.values():
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                with suppress(Exception):  # of a GPU that has failed; the process's end unmaps it
                    opening.result().close()

    def _open(self, handle: pb.PoolHandle) -> PeerPool:
        peer = open_peer(handle.descriptor, handle.transport, self._layout, self._device)
        self._speeds.labels(handle.instance).set(peer.bytes_per_second)
        return peer


def problem_of(opening: Future[PeerPool]) -> str:
    """Why the pool could not be opened; empty if it could."""
    error = opening.exception()
    if error is None:
        return ""
    # JSON may hold halves of characters, and so what is quoted of a descriptor; a message takes none.
    return (str(error) or repr(error))[:MAX_PROBLEM].encode(errors="replace").decode()
