"""This process's NIXL agent: registered memory that peers read, and reads of theirs, over UCX.

One agent for all peers: each has a thread and connections of its own, and memory that two register is pinned twice.
"""

import functools
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import nixl._bindings as nixl
import numpy as np
import numpy.typing as npt
import torch

from common.transport.interface import TransportError

# Microseconds that the agent's thread sleeps at most where nothing wakes it. That thread answers peers that read over
# TCP. NIXL's own Python class sets 0, and then the thread keeps a core busy for as long as the process lives.
_SLEEP_US = 1000
_POLL_SECONDS = 0.0002
# How long TCP sends again what a peer does not confirm. Without it, a read from a host that is cut off would end, and
# give its blocks back, after a quarter of an hour.
_TCP_TIMEOUT = ("UCX_TCP_USER_TIMEOUT", "10s")


class ReadFailed(Exception):
    """A read did not end well, and nothing of it arrives any more."""


class NotYet(Exception):
    """A read takes too long, and may still write to its target. The agent keeps that alive until the read has ended."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Pieces of memory of one device: rows of (address, bytes, device), uint64 [n, 3]."""

    rows: npt.NDArray[np.uint64]
    on_gpu: bool

    def descriptors(self) -> nixl.nixlXferDList:
        return nixl.nixlXferDList(nixl.VRAM_SEG if self.on_gpu else nixl.DRAM_SEG, self.rows)


def spans(addresses: npt.NDArray[np.uint64], num_bytes: int, device: torch.device) -> Spans:
    """A piece of `num_bytes` at each of the addresses (uint64 [n])."""
    rows = np.empty((len(addresses), 3), np.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2] = addresses, num_bytes, device.index or 0
    return Spans(rows, device.type == "cuda")


class Agent:
    """Thread-safe.

    Raises:
        TransportError: NIXL or UCX cannot start here.
    """

    def __init__(self) -> None:
        os.environ.setdefault(*_TCP_TIMEOUT)
        config = nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = _SLEEP_US
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        try:
            self._agent = nixl.nixlAgent(f"twostroke-{uuid.uuid4().hex}", config)
            self._backend = self._agent.createBackend("UCX", {})
        except Exception as error:  # NIXL's errors have no common base class
            tls = os.environ.get("UCX_TLS")
            raise TransportError(
                f"NIXL cannot start UCX ({error!r}); " + (f"UCX_TLS is {tls}" if tls else "UCX_LOG_LEVEL=info says why")
            ) from error
        self._lock = threading.Lock()
        self._given_up: list[tuple[int, object]] = []  # requests, and what owns the memory that they write to
        self._registered: dict[tuple[int, int], nixl.nixlRegDList] = {}  # by address and bytes

    def register(self, address: int, num_bytes: int, device: torch.device) -> None:
        """Lets peers read this memory, and reads of theirs arrive in it. Does nothing where all of it is registered.

        Raises:
            TransportError: UCX cannot take it.
        """
        with self._lock:
            if any(start <= address and address + num_bytes <= start + size for start, size in self._registered):
                return
            memory = nixl.VRAM_SEG if device.type == "cuda" else nixl.DRAM_SEG
            pieces = nixl.nixlRegDList(memory, [(address, num_bytes, device.index or 0, "")])
            try:
                self._agent.registerMem(pieces, [self._backend])
            except Exception as error:
                raise TransportError(
                    f"NIXL cannot register {num_bytes >> 20} MiB on {device} ({error!r}); with InfiniBand, look at the "
                    "limit of locked memory (ulimit -l)"
                ) from error
            self._registered[address, num_bytes] = pieces

    def deregister(self, address: int, num_bytes: int) -> None:
        with self._lock:
            if (pieces := self._registered.pop((address, num_bytes), None)) is not None:
                self._agent.deregisterMem(pieces, [self._backend])

    def metadata(self) -> bytes:
        """What a peer needs to connect, and to read what is registered by now."""
        return bytes(self._agent.getLocalMD())

    def connect(self, metadata: bytes) -> str:
        """Returns the peer's name.

        Raises:
            ReadFailed: the peer is gone, out of reach, or of another version of NIXL.
        """
        try:
            return bytes(self._agent.loadRemoteMD(metadata)).decode()
        except Exception as error:
            raise ReadFailed(repr(error)) from error

    def disconnect(self, peer: str) -> None:
        """Forgets the peer, so that `connect` begins anew. Does nothing where it isn't known."""
        with suppress(Exception):
            self._agent.invalidateRemoteMD(peer)

    def read(self, peer: str, source: Spans, target: Spans, give_up: Callable[[], bool], keep: object = None) -> None:
        """Reads the peer's `source` into `target`, pair by pair, and waits for it.

        A read can't be taken back: NIXL cancels none that waits for its peer, and what comes late is written all the
        same. So it ends with the data, with the connection, or, as far as this call goes, when it is given up.

        Args:
            give_up: asked again and again whether to wait no longer.
            keep: what owns the target's memory.

        Raises:
            ReadFailed: the connection is lost, or source or target is not registered.
            NotYet: it was given up.
        """
        self._release_ended()
        try:
            request = self._agent.createXferReq(
                nixl.NIXL_READ, target.descriptors(), source.descriptors(), peer, "", [self._backend]
            )
        except Exception as error:
            raise ReadFailed(repr(error)) from error
        try:
            status = self._agent.postXferReq(request)
            while status == nixl.NIXL_IN_PROG:
                if give_up():
                    with self._lock:
                        self._given_up.append((request, keep))
                    raise NotYet
                time.sleep(_POLL_SECONDS)
                status = self._agent.getXferStatus(request)
        except NotYet:
            raise
        except Exception as error:
            self._release(request)
            raise ReadFailed(repr(error)) from error
        self._release(request)

    def _release_ended(self) -> None:
        with self._lock:
            self._given_up = [(request, keep) for request, keep in self._given_up if not self._ended(request)]

    def _ended(self, request: int) -> bool:
        with suppress(Exception):  # a lost connection ends it, too
            if self._agent.getXferStatus(request) == nixl.NIXL_IN_PROG:
                return False
        self._release(request)
        return True

    def _release(self, request: int) -> None:
        with suppress(Exception):
            self._agent.releaseXferReq(request)


@functools.cache
def own_agent() -> Agent:
    """This process's agent, started with the first call. Raises TransportError where it can't be."""
    return Agent()
