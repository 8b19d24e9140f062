"""Finished prompts whose blocks wait for a decode worker to take them."""

from dataclasses import dataclass

from common.kv.block_pool import BlockPool
from prefill_worker.scheduler import Prompt


@dataclass(frozen=True, slots=True)
class Lease:
    attempt_id: int
    connection: int
    request_id: str
    blocks: list[int]
    expires: float  # time.monotonic()


class Leases:
    """Blocks held for each attempt, until the router ends the lease or disconnects, or the lease expires."""

    def __init__(self, blocks: BlockPool, seconds: float) -> None:
        self._blocks = blocks
        self._seconds = seconds
        self._leases: dict[int, Lease] = {}  # oldest first, so in order of expiry

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, attempt_id: int) -> bool:
        return attempt_id in self._leases

    def grant(self, prompt: Prompt, now: float) -> None:
        self._leases[prompt.attempt_id] = Lease(
            prompt.attempt_id, prompt.connection, prompt.spec.request_id, prompt.blocks, now + self._seconds
        )

    def end(self, attempt_id: int) -> None:
        lease = self._leases.pop(attempt_id, None)
        if lease is not None:
            self._blocks.release(lease.blocks)

    def end_connection(self, connection: int) -> None:
        for attempt_id in [a for a, lease in self._leases.items() if lease.connection == connection]:
            self.end(attempt_id)

    def expire(self, now: float) -> list[Lease]:
        """Ends the leases that were not taken in time, and returns them. If a decode worker is still reading such a
        block, it will find another generation afterwards and discard what it read."""
        expired = []
        for lease in self._leases.values():
            if lease.expires > now:
                break
            expired.append(lease)
        for lease in expired:
            self.end(lease.attempt_id)
        return expired
