"""A worker's file in /dev/shm: who it is, how its pool is laid out, its blocks' generations; and, for shm, the pool.

    header (one page) | generations, uint64 [num_blocks], padded to a page | body

The owner holds an exclusive flock on the file for as long as it lives; the kernel drops it however the process ends. So
whoever gets the lock knows that the owner is gone, and `sweep` removes what it left.
"""

import atexit
import fcntl
import json
import mmap
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from common.kv.kv_pool import KvLayout
from common.transport.checks import check_layout, generations_hold
from common.transport.interface import TransportError

DIRECTORY = Path("/dev/shm")
PREFIX = "twostroke-"
KIND = b"twostroke kv "  # what the file begins with, in any version
MAGIC = KIND + b"1\n"
HEADER_BYTES = mmap.PAGESIZE

_INSTANCE = re.compile(r"[0-9A-Za-z_-]{1,128}")


@dataclass(frozen=True, slots=True)
class Header:
    """What a segment says about itself."""

    instance: str
    nonce: str  # also in the descriptor: a later file of the same name is not taken for this one
    layout: KvLayout
    probe_digest: str  # BLAKE2b-128 of the probe, hexadecimal

    def to_bytes(self) -> bytes:
        return MAGIC + json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_bytes(cls, page: bytes) -> Self:
        """Raises ValueError, KeyError or TypeError where `page` is no header of this version."""
        if not page.startswith(MAGIC):
            raise ValueError("its header is not of this version")
        fields = json.loads(page[len(MAGIC) :].split(b"\n", 1)[0])
        return cls(**{**fields, "layout": KvLayout(**fields["layout"])})


def _generations_end(num_blocks: int) -> int:
    return HEADER_BYTES + 8 * num_blocks


def _body_start(num_blocks: int) -> int:
    return -(-_generations_end(num_blocks) // mmap.PAGESIZE) * mmap.PAGESIZE


class OwnSegment:
    """The segment that this process owns: created with all its memory, locked for life, and unlinked by `close` or an
    orderly exit."""

    def __init__(self, instance: str, layout: KvLayout, body_bytes: int) -> None:
        """Raises TransportError if /dev/shm has no room for it, or there is another process of that name."""
        if not _INSTANCE.fullmatch(instance):
            raise TransportError(f'"{instance}" cannot name a segment: use up to 128 letters, digits, "-" and "_"')
        self.nonce = secrets.token_hex(8)
        self._instance, self._layout = instance, layout
        self._path = DIRECTORY / (PREFIX + instance)
        body_start = _body_start(layout.num_blocks)
        size = body_start + body_bytes
        _check_room(size)
        atexit.register(self._path.unlink, missing_ok=True)  # a signal may end the process at any moment from here on
        try:
            self._fd = _create_locked(self._path)
        except TransportError:  # the file that is there belongs to another process
            atexit.unregister(self._path.unlink)
            raise
        try:
            # Takes the memory now: with a sparse file, SIGBUS would end this process at the first page that is missing.
            os.posix_fallocate(self._fd, 0, size)
            self._map = mmap.mmap(self._fd, size)
        except OSError as error:
            self._unlink()
            os.close(self._fd)
            raise TransportError(f"{size >> 20} MiB in {DIRECTORY} cannot be had: {error.strerror}") from error
        self.generations = memoryview(self._map)[HEADER_BYTES : _generations_end(layout.num_blocks)].cast("Q")
        self.body = memoryview(self._map)[body_start:]

    def publish(self, probe_digest: str) -> None:
        """Writes the header, after which peers may open the segment."""
        header = Header(self._instance, self.nonce, self._layout, probe_digest).to_bytes()
        self._map[: len(header)] = header

    def descriptor(self, **extra: str) -> bytes:
        """JSON: the segment's name and nonce, and what a transport adds."""
        return json.dumps({"segment": self._path.name, "nonce": self.nonce, **extra}).encode()

    def close(self) -> None:
        """Unlinks and unlocks the file. The mapping lasts as long as there are views of it."""
        if self._fd < 0:
            return
        self._unlink()
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # the mapping holds a duplicate of the descriptor, and the lock with it
        os.close(self._fd)
        self._fd = -1

    def _unlink(self) -> None:
        self._path.unlink(missing_ok=True)
        atexit.unregister(self._path.unlink)


class PeerSegment:
    """Another process's segment, mapped read-only.

    Raises:
        TransportError: it is not here, is not the one described, cannot be read by this user, or its layout differs.
    """

    def __init__(self, descriptor: bytes, layout: KvLayout) -> None:
        self.extra, name, nonce = _parse(descriptor)
        path = DIRECTORY / name
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)  # it may be a pipe
        except FileNotFoundError as error:
            raise TransportError(
                f"{path} is not here: its worker is gone, or runs with another /dev/shm; containers of one host must "
                "share theirs (ipc: host, or a shared volume at /dev/shm)"
            ) from error
        except OSError as error:
            raise TransportError(
                f"{path} cannot be opened ({error.strerror}); run both workers as the same user"
            ) from error
        try:
            self.header = self._read_header(path, nonce)
            check_layout(str(path), self.header.layout, layout)
            self._map = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
        except BaseException:
            os.close(self._fd)
            raise
        num_blocks = self.header.layout.num_blocks
        self._generations = memoryview(self._map)[HEADER_BYTES : _generations_end(num_blocks)].cast("Q")
        self.body = memoryview(self._map)[_body_start(num_blocks) :]

    def _read_header(self, path: Path, nonce: str) -> Header:
        try:
            header = Header.from_bytes(os.pread(self._fd, HEADER_BYTES, 0))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TransportError(
                f"{path} is no segment of this version ({error}); run one version of all workers"
            ) from error
        if header.nonce != nonce:
            raise TransportError(f"{path} belongs to a later worker of the same name; the one described is gone")
        if not self.owner_alive():
            raise TransportError(f"{path} was left behind by a worker that is gone")
        return header

    def generations_hold(self, blocks: Sequence[int], expected: Sequence[int]) -> bool:
        return generations_hold(self._generations, blocks, expected)

    def owner_alive(self) -> bool:
        return not _try_lock(self._fd, fcntl.LOCK_SH)

    def close(self) -> None:
        """Unmaps the segment. All views of `body` must be gone by then."""
        if self._fd < 0:
            return
        self._generations.release()
        self.body.release()
        self._map.close()
        os.close(self._fd)
        self._fd = -1


def sweep() -> None:
    """Unlinks the segments of this user whose owners are gone."""
    for path in DIRECTORY.glob(PREFIX + "*"):
        with suppress(OSError):  # another user's, no file, or gone meanwhile
            _unlink_if_left(path)


def _unlink_if_left(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        head = os.pread(fd, len(KIND), 0)
        ours = head in (KIND, bytes(len(head)))  # zeros: it was not published yet
        # Without links, another sweep was faster, and a new file may have the name already.
        if ours and _try_lock(fd, fcntl.LOCK_EX) and os.fstat(fd).st_nlink:
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _try_lock(fd: int, operation: int) -> bool:
    """Whether the lock could be taken. A shared lock is released at once, an exclusive one when the file is closed."""
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if operation == fcntl.LOCK_SH:
        fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def _create_locked(path: Path) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TransportError(f"{path} cannot be created: {error.strerror}") from error
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # another process's sweep came between creation and lock


def _check_room(size: int) -> None:
    status = os.statvfs(DIRECTORY)
    free = status.f_bavail * status.f_frsize
    if size > free and status.f_blocks:  # a tmpfs without a limit says 0 of 0
        raise TransportError(
            f"the KV pool needs {(size >> 20) + 1} MiB of shared memory and {DIRECTORY} has {free >> 20} MiB free: "
            "raise its size (docker run --shm-size, shm_size in a compose file, an emptyDir with medium: Memory "
            "mounted there on Kubernetes) or lower --num-blocks"
        )


def _parse(descriptor: bytes) -> tuple[dict[str, str], str, str]:
    try:
        fields = json.loads(descriptor)
        name, nonce = fields.pop("segment"), fields.pop("nonce")
        if not name.startswith(PREFIX) or not _INSTANCE.fullmatch(name[len(PREFIX) :]):
            raise ValueError("it names no segment")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise TransportError(
            f"the peer's pool descriptor is malformed ({error!r}); run one version of all workers"
        ) from error
    return fields, name, nonce
