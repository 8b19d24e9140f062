"""Finished prompts whose blocks wait for a decode worker to take them."""

from itertools import takewhile

from common.kv.block_pool import BlockPool
from prefill_worker.scheduler import Prompt


class Leases:
    """Prompts whose blocks are held, until the router ends the lease or disconnects, or the lease expires."""

    def __init__(self, blocks: BlockPool, seconds: float) -> None:
        self._blocks = blocks
        self._seconds = seconds
        self._leases: dict[int, tuple[Prompt, float]] = {}  # until when; oldest first, so in order of expiry

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, attempt_id: int) -> bool:
        return attempt_id in self._leases

    def grant(self, prompt: Prompt, now: float) -> None:
        self._leases[prompt.attempt_id] = prompt, now + self._seconds

    def end(self, attempt_id: int) -> None:
        if (lease := self._leases.pop(attempt_id, None)) is not None:
            self._blocks.release(lease[0].blocks)

    def end_connection(self, connection: int) -> None:
        for attempt_id in [a for a, (prompt, _) in self._leases.items() if prompt.connection == connection]:
            self.end(attempt_id)

    def expire(self, now: float) -> list[Prompt]:
        """Ends the leases that were not taken in time, and returns their prompts. If a decode worker is still reading
        such a block, it will find another generation afterwards and discard what it read."""
        expired = [prompt for prompt, _ in takewhile(lambda lease: lease[1] <= now, self._leases.values())]
        for prompt in expired:
            self.end(prompt.attempt_id)
        return expired
