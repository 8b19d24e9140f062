"""Finished prompts whose blocks wait for a decode worker to take them."""

from dataclasses import dataclass

from common.block_pool import BlockPool


@dataclass(frozen=True, slots=True)
class Lease:
    connection: int
    blocks: list[int]
    expires: float  # time.monotonic()


class Leases:
    """Blocks by attempt. A lease ends when the router says so, when the router goes, or by itself."""

    def __init__(self, blocks: BlockPool, seconds: float) -> None:
        self._blocks = blocks
        self._seconds = seconds
        self._leases: dict[int, Lease] = {}  # the oldest first, so the first to expire first

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, attempt_id: int) -> bool:
        return attempt_id in self._leases

    def grant(self, attempt_id: int, connection: int, blocks: list[int], now: float) -> None:
        self._leases[attempt_id] = Lease(connection, blocks, now + self._seconds)

    def end(self, attempt_id: int) -> None:
        lease = self._leases.pop(attempt_id, None)
        if lease is not None:
            self._blocks.release(lease.blocks)

    def end_connection(self, connection: int) -> None:
        for attempt_id in [a for a, lease in self._leases.items() if lease.connection == connection]:
            self.end(attempt_id)

    def expire(self, now: float) -> list[tuple[int, int]]:
        """Ends what was not taken in time; returns (attempt, connection) of each. The reader of a block that went this
        way sees its generation change and drops what it read."""
        expired = []
        for attempt_id, lease in self._leases.items():
            if lease.expires > now:
                break
            expired.append((attempt_id, lease.connection))
        for attempt_id, _ in expired:
            self.end(attempt_id)
        return expired
