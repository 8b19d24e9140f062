"""What an engine knows of its `WorkerService`: a queue of what routers sent, and a message to each of them."""

from collections import defaultdict

from common.worker.unsent import Unsent
from common.worker.worker_service import Received
from twostroke.v1 import worker_pb2 as pb


class Wire:
    def __init__(self, address: str) -> None:
        self.address = address
        self._inbox: list[Received] = []
        self._outgoing: dict[int, pb.WorkerMessage] = defaultdict(pb.WorkerMessage)
        self._unsent: dict[int, Unsent] = {}  # by connection
        self._next_connection = 0

    # ------------------------------------------------------------ for the engine

    def receive(self, timeout: float) -> list[Received]:
        received, self._inbox = self._inbox, []
        return received

    def wake(self) -> None:
        """`receive` does not wait."""

    @property
    def connections(self) -> tuple[int, ...]:
        return tuple(self._unsent)

    def outgoing(self, connection: int) -> pb.WorkerMessage:
        return self._outgoing[connection]

    def flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, defaultdict(pb.WorkerMessage)
        for connection, message in outgoing.items():
            if (unsent := self._unsent.get(connection)) is not None:
                unsent.put(message)

    # ------------------------------------------------------------ for the links

    def connect(self) -> tuple[int, Unsent]:
        """A new connection, and what the engine has for it."""
        connection, self._next_connection = self._next_connection, self._next_connection + 1
        unsent = self._unsent[connection] = Unsent(cut_off=lambda: None)
        self.put(connection, pb.RouterMessage())
        return connection, unsent

    def put(self, connection: int, message: pb.RouterMessage) -> None:
        self._inbox.append(Received(connection, message))

    def disconnect(self, connection: int) -> None:
        del self._unsent[connection]
        self._inbox.append(Received(connection, None))
