"""Room that routers wait for, and whose turn it is. A small request fits wherever one has ended; a large one would wait
for as long as other routers have small ones."""


class Claims:
    """The blocks that each connection's router waits for. Those of the one that has waited longest are kept from all
    others."""

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}  # by connection, the longest wait first

    def set(self, connection: int, blocks: int) -> None:
        """0: it waits no more."""
        if blocks:
            self._blocks[connection] = blocks
        else:
            self._blocks.pop(connection, None)

    def kept_from(self, connection: int) -> int:
        """Blocks that this connection's requests must leave."""
        first = next(iter(self._blocks), connection)
        return 0 if first == connection else self._blocks[first]
