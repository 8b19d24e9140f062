"""Room that routers wait for, and whose turn it is. A small request fits wherever one has ended; a large one would wait
for as long as other routers have small ones."""

import time

# Seconds that a claim holds unless it is repeated, as routers do every second.
CLAIM_SECONDS = 10.0


class Claims:
    """The blocks that each connection's router waits for. Those of the one that has waited longest are kept from all
    others."""

    def __init__(self) -> None:
        self._claims: dict[int, tuple[int, float]] = {}  # blocks, and until when; by connection, the longest wait first

    def set(self, connection: int, blocks: int) -> None:
        """0: it waits no more."""
        if blocks:
            self._claims[connection] = blocks, time.monotonic() + CLAIM_SECONDS
        else:
            self._claims.pop(connection, None)

    def kept_from(self, connection: int) -> int:
        """Blocks that this connection's requests must leave."""
        while self._claims:
            first, (blocks, until) = next(iter(self._claims.items()))
            if time.monotonic() < until:
                return 0 if first == connection else blocks
            del self._claims[first]
        return 0
