"""What a KV transport offers: an owner's pool that peers can read, and a peer's pool seen from the reader."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from common.kv.block_pool import Generations
from common.kv.kv_pool import KvPool
from common.start_error import StartError


class TransportError(StartError):
    """A transport does not work here. Its text is a sentence that says why and what to change."""


class TransferFailed(TransportError):
    """Blocks could not be read. What the target blocks hold now is undefined."""


class PoolMemory(Protocol):
    """The memory of a worker's own pool. Only the owner writes to it."""

    @property
    def tensor(self) -> Tensor:
        """uint8 [layout.pool_bytes], zeroed when new."""

    @property
    def generations(self) -> Generations:
        """One 64-bit counter for each block, where peers can read it; for the owner's BlockPool."""

    @property
    def descriptor(self) -> bytes:
        """What a peer needs to open the pool. It is printable, and no secret: the operating system controls access."""

    def close(self) -> None:
        """Lets no more peers open the pool. The memory is freed with the last tensor that views it."""


class Transfer(Protocol):
    """Blocks on their way into the reader's pool."""

    @property
    def milliseconds(self) -> float:
        """How long the copy itself took. Only once it is done."""

    def done(self) -> bool:
        """Whether the copy is done, without waiting. Raises TransferFailed, every time, if it went wrong."""

    def wait(self) -> None:
        """Waits until the copy is done. Raises as `done` does."""


class PeerPool(Protocol):
    """Another worker's pool, read-only. One reader thread at a time."""

    @property
    def bytes_per_second(self) -> float:
        """Speed at which blocks were read when the pool was opened."""

    def read(self, src_blocks: Sequence[int], dst: KvPool, dst_blocks: Sequence[int]) -> Transfer:
        """Starts to copy the peer's `src_blocks` into `dst_blocks` of `dst`, pair by pair, and returns at once.

        Until the transfer is done, nobody else may use the target blocks. Afterwards, ask `generations_hold` whether
        the source still held what it should: its owner raises a block's generation before rewriting it.

        Raises:
            TransferFailed: the two lists do not match, a block is outside its pool, or the peer's pool was closed.
        """

    def generations_hold(self, blocks: Sequence[int], expected: Sequence[int]) -> bool:
        """Whether each of the peer's `blocks` still has the `expected` generation."""

    def owner_alive(self) -> bool:
        """False once the owner closed its pool or died."""

    def close(self) -> None:
        """Unmaps the peer's memory, after transfers under way have ended."""
